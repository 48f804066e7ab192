import pytest
from helpers.checkout import make_checkout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The current folder: a checkout with the recipe `tiny`, in which nothing has run."""
    folder = make_checkout(tmp_path / "checkout")
    monkeypatch.chdir(folder)
    return folder
