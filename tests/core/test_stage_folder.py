"""A stage's folder after runs that ended anywhere: nothing finished is lost, nothing half done is taken for whole."""

import contextlib
import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.kills import is_killed
from hypothesis import given, settings
from hypothesis import strategies as st

from sandan.core import stage as stages
from sandan.core.errors import Interrupted, UserError
from sandan.core.files import temporary_name
from sandan.core.stage import RECIPE, RESULT, Stage, require_whole
from sandan.core.stage_folder import LOCK, PREVIOUS, UNFINISHED


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Reading the versions of packages takes longer than a whole made-up run."""
    monkeypatch.setattr(stages, "VERSIONED", ())


def make(folder, settings="old"):
    return Stage("sft", "tiny", folder, 0, {"settings": settings})


def write(folder, settings):
    """Write what a run writes, with a model of several files, some in place and some in folders."""
    for name in ("model.safetensors", "config.json", f"{settings}.txt", "value_model/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(settings)


def run(folder, settings, failure=None):
    """Do what a script does; raise `failure` in the middle."""
    with make(folder, settings).opened() as stage:
        write(stage.begin_writing(), settings)
        checkpoint = folder / "checkpoint-1"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "model.safetensors").write_text(settings)
        if failure:
            raise failure
        stage.finish({})


def make_mistake(folder):
    """Be a run that ends before it writes."""
    with make(folder, "other").opened():
        raise UserError("typo")


def mistake(folder):
    with pytest.raises(UserError, match="typo"):
        make_mistake(folder)


def content(folder):
    """Return every file of a folder with its bytes and its time; without checkpoints, lock and unfinished runs."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path: path.relative_to(folder) for path in paths}
    kept = [path for path in paths if names[path].parts[0] not in (UNFINISHED, LOCK, "checkpoint-1")]
    return {str(names[path]): (path.read_bytes(), path.stat().st_mtime_ns) for path in kept}


def texts(folder):
    """Return the texts of all files without those that tell the time."""
    return {name: text for name, (text, _) in content(folder).items() if name != RESULT}


def models(folder):
    return {path.read_bytes() for path in folder.rglob("model.safetensors*") if path.is_file()}


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("once") / "tiny" / "sft"
    run(folder, "old")
    (folder / "notes.md").write_text("mine")
    return folder


@pytest.fixture
def copies(finished_once, tmp_path):
    """Give new copies of a finished stage."""
    return (Path(shutil.copytree(finished_once, tmp_path / str(number) / "sft")) for number in itertools.count())


def check_is_whole_or_refused(folder):
    """Check that the next stage takes a model only with the recipe and the result of the run that made it."""
    if (folder / RESULT).exists():
        require_whole(folder)
        made = json.loads((folder / RESULT).read_text())["config"]["settings"]
        assert models(folder / "value_model") == {made.encode()} == {(folder / "model.safetensors").read_bytes()}
        assert f"settings: {made}" in (folder / RECIPE).read_text()
        return made
    with pytest.raises(UserError, match=r"did not finish \(no result.json\); run `make sft RECIPE=tiny` first"):
        require_whole(folder)
    return None


def kill_everywhere(copies, action, prepare=lambda folder: None):
    """Kill `action` at each of its changes; give the folder after each, twice."""
    for number in itertools.count():
        folders = next(copies), next(copies)
        for folder in folders:
            prepare(folder)
            killed = is_killed(number, lambda folder=folder: action(folder))
        yield folders
        if not killed:
            return


def check_nothing_is_lost(folders, before, after):
    """Check that after a kill a mistake brings the finished stage back, and that a new run goes through."""
    corrected, again = folders
    made = check_is_whole_or_refused(corrected)
    assert made == "new" or b"old" in models(corrected)
    mistake(corrected)
    assert check_is_whole_or_refused(corrected) == (made or "old")
    if made != "new":
        assert content(corrected) == before
    run(again, "new")
    assert texts(again) == after and check_is_whole_or_refused(again) == "new"
    assert not (again / UNFINISHED).exists() and not (again / PREVIOUS).exists()


@pytest.fixture
def whole(copies):
    """Return the content of a finished stage, and that of its uninterrupted rerun."""
    folder = next(copies)
    before = content(folder)
    run(folder, "new")
    return before, texts(folder)


def test_a_rerun_replaces_a_stage_but_not_the_notes_of_a_user(whole):
    before, after = whole
    assert set(after) | {RESULT} == set(before) | {"new.txt"} and after["notes.md"] == b"mine"
    assert after["model.safetensors"] == b"new"


def test_killed_at_every_change_of_a_rerun(copies, whole):
    tried = [
        check_nothing_is_lost(folders, *whole) for folders in kill_everywhere(copies, lambda path: run(path, "new"))
    ]
    assert len(tried) > 20


def test_killed_at_every_change_of_putting_back(copies, whole):
    def fail(folder):
        with contextlib.suppress(ZeroDivisionError):
            run(folder, "new", ZeroDivisionError())

    def stop(folder):
        with contextlib.suppress(Interrupted):
            run(folder, "new", Interrupted())

    tried = [check_nothing_is_lost(folders, *whole) for folders in kill_everywhere(copies, fail)]
    tried += [check_nothing_is_lost(folders, *whole) for folders in kill_everywhere(copies, mistake, stop)]
    assert len(tried) > 30


def test_killed_at_every_change_of_a_first_run(tmp_path):
    empty = (tmp_path / str(number) / "sft" for number in itertools.count())
    for folders in kill_everywhere(empty, lambda path: run(path, "new")):
        mistake(folders[0])
        for folder in folders:
            run(folder, "new")
            assert check_is_whole_or_refused(folder) == "new"


@pytest.mark.parametrize("failure", [ZeroDivisionError(), UserError("no room"), SystemExit(3), KeyboardInterrupt()])
def test_a_run_that_fails_puts_the_finished_stage_back_and_keeps_what_it_made(failure, copies, caplog):
    folder, before = next(copies), None
    before = content(folder)
    with pytest.raises(type(failure)):
        run(folder, "new", failure)
    assert content(folder) == before and check_is_whole_or_refused(folder) == "old"
    assert (folder / UNFINISHED / "model.safetensors").read_bytes() == b"new"
    assert not make(folder).was_finished()  # the checkpoints are of a run that can go on
    run(folder, "new")
    assert make(folder).was_finished() and not (folder / UNFINISHED).exists()


def test_what_two_failed_runs_made_is_kept_until_one_finishes(copies):
    folder = next(copies)
    for made in ("new", "newer"):
        with pytest.raises(ZeroDivisionError):
            run(folder, made, ZeroDivisionError())
    kept = {name: (folder / UNFINISHED / name).read_bytes() for name in ("model.safetensors", "model.safetensors.2")}
    assert kept == {"model.safetensors": b"new", "model.safetensors.2": b"newer"}


def test_a_run_that_a_signal_stops_leaves_no_result_so_that_make_and_schedulers_go_on(copies):
    folder = next(copies)
    before = content(folder)
    with pytest.raises(Interrupted):
        run(folder, "new", Interrupted("SIGTERM"))
    assert check_is_whole_or_refused(folder) is None
    mistake(folder)
    assert content(folder) == before


def test_an_earlier_model_does_not_lie_beside_the_new_one(copies):
    folder = next(copies)
    (folder / "model-00001-of-00002.safetensors").write_text("old")
    (folder / "adapter").mkdir()
    run(folder, "new")
    assert not (folder / "model-00001-of-00002.safetensors").exists() and not (folder / "adapter").exists()


def test_a_finished_stage_without_its_recipe_is_put_back_too(copies):
    folder = next(copies)
    before = content(folder)
    (folder / RECIPE).unlink()
    with pytest.raises(ZeroDivisionError):
        run(folder, "new", ZeroDivisionError())
    assert {**content(folder), RECIPE: before[RECIPE]} == before and check_is_whole_or_refused(folder) == "old"


# ---- Two runs ----


def test_the_second_run_in_a_folder_is_refused_in_one_line(copies):
    folder = next(copies)
    with make(folder).opened():
        before = content(folder)
        with pytest.raises(
            UserError, match=r"another run is writing here; wait for its end or give another --output_"
        ):
            make(folder).open()
        assert content(folder) == before and (folder / LOCK).exists()
    run(folder, "new")
    assert not (folder / LOCK).exists()


def test_a_disk_without_locks_is_said_and_used(copies, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    folder = next(copies)
    run(folder, "new")
    assert check_is_whole_or_refused(folder) == "new" and "this disk has no locks" in caplog.text


def test_other_ranks_need_no_lock(copies, monkeypatch):
    with make(next(copies)).opened() as stage:
        monkeypatch.setenv("RANK", "1")
        with make(stage.output_dir).opened() as other:
            other.begin_writing()
            other.finish({})
        monkeypatch.undo()
        assert (stage.output_dir / LOCK).exists() and "settings: old" in (stage.output_dir / RECIPE).read_text()


# ---- Inputs ----


@pytest.mark.parametrize("name", [".", "candidates.jsonl"])
def test_an_input_of_a_stage_that_did_not_finish_is_refused(name, copies, tmp_path):
    folder = next(copies)
    (folder / "candidates.jsonl").write_text("{}\n")
    make(tmp_path / "next").add_input(folder / name)
    (folder / RESULT).unlink()
    with pytest.raises(UserError, match="did not finish"):
        make(tmp_path / "next").add_input(folder / name)


def test_an_input_that_is_not_what_its_recipe_says_is_refused(copies, tmp_path):
    folder = next(copies)
    (folder / RECIPE).write_text((folder / RECIPE).read_text().replace("old", "new"))
    with pytest.raises(UserError, match=r"recipe.yaml is not that of result.json \(settings\); run `make sft RECIPE="):
        make(tmp_path / "next").add_input(folder)


# ---- Any state ----

PARTS = (RECIPE, RESULT, "model.safetensors", "value_model/model.safetensors", "notes.md")
NAMES = (
    *(f"{place}{name}" for place in ("", f"{PREVIOUS}/", f"{UNFINISHED}/") for name in PARTS),
    *(temporary_name(name) for name in (RECIPE, RESULT)),
    "checkpoint-1/model.safetensors",
    ".saving/checkpoint-2/model.safetensors",
    LOCK,
    PREVIOUS,
    UNFINISHED,
)
FATES = ("whole", "half", "empty")


def fates(name):
    """Return how a file may be found; one that a run itself does not write may also be a folder."""
    return st.tuples(st.just(name), st.sampled_from(FATES if name.endswith(PARTS[2:]) else (*FATES, "folder")))


@settings(max_examples=100, deadline=None)
@given(state=st.lists(st.sampled_from(NAMES).flatmap(fates), max_size=12, unique_by=lambda pair: pair[0]))
def test_any_state_of_a_folder_is_opened_or_refused_in_one_line(state, finished_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "tiny" / "sft"
    folder.mkdir(parents=True)
    for name, fate in state:
        put(folder / name, fate, finished_once / name.removeprefix(f"{PREVIOUS}/").removeprefix(f"{UNFINISHED}/"))
    before = models(folder)
    for action in (make_mistake, lambda path: run(path, "new")):
        try:
            action(folder)
        except UserError as error:
            assert "\n" not in str(error)
        if action is make_mistake:
            assert models(folder) == before


def put(path, fate, source):
    """Put a file of a finished stage there: whole, cut off, empty, or a folder in its place."""
    text = source.read_bytes() if source.is_file() else b"model"
    with contextlib.suppress(FileExistsError, NotADirectoryError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if fate == "folder":
            path.mkdir(exist_ok=True)
        elif not path.is_dir():
            path.write_bytes({"whole": text, "half": text[: len(text) // 2], "empty": b""}[fate])
