"""Find, describe and copy recipes: folders with a YAML file for each stage."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..core.chain import STAGES, StageRow
from ..core.errors import UserError
from ..core.places import HOME, here_or_embedded, shown
from .names import nearest


RECIPES = Path("recipes")
# A folder of launch files, not a recipe.
LAUNCH_FILES = "accelerate_configs"
RESULT = "result.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Args:
        folder: of its YAML files.
    """

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def rows(self) -> list[StageRow]:
        """The rows of the stages that it has, in the order of the chain."""
        return [row for row in STAGES.values() if self.file(row.name).is_file()]

    def file(self, stage: str) -> Path:
        """Return the path of the stage's YAML file, which a recipe need not have."""
        return self.folder / f"{stage}.yaml"

    def text(self, stage: str) -> str:
        """Return the text of the stage's YAML file; its script says what is wrong with it."""
        return self.file(stage).read_text(encoding="utf-8", errors="replace")

    def require(self, stage: str) -> None:
        """Refuse a stage that this recipe does not have."""
        if not self.file(stage).is_file():
            stages = ", ".join(row.name for row in self.rows)
            raise UserError(f"{shown(self.file(stage))}: no such file; the stages of {self.name} are {stages}")

    def output_dir(self, stage: str) -> Path:
        """Return the stage's output folder, as its YAML file names it."""
        return Path(self.setting(stage, "output_dir") or Path("outputs", self.name, stage))

    def setting(self, stage: str, key: str) -> str | None:
        """Return the text that the stage's YAML file gives for a key; None if it gives none, or there is no file."""
        text = self.text(stage) if self.file(stage).is_file() else ""
        found = re.search(rf"^{key}:[ \t]*(?:\"([^\"\n]*)\"|'([^'\n]*)'|([^\s\"'#]+))", text, re.MULTILINE)
        word = next(filter(None, found.groups()), None) if found else None
        return None if word in ("null", "~") else word

    def judgement_file(self) -> str:
        """Return the log of what people judged."""
        return f"annotations/{self.name}/judgements.jsonl"

    def evaluated_models(self) -> dict[str, str]:
        """Return the models that the evaluation compares: the folders of its own stages, or what `evaluate.yaml` names."""
        models = {}
        for row in STAGES.values():
            if row.evaluated_as and row in self.rows:
                models[row.evaluated_as] = str(self.output_dir(row.name))
            elif row.evaluated_as and self.file("evaluate").is_file():
                models[row.evaluated_as] = self.setting("evaluate", f"{row.evaluated_as}_model")
        return {name: path for name, path in models.items() if path}

    def local_inputs(self, stage: str) -> list[Path]:
        """Return the files and folders outside `outputs/` that the stage's YAML file names and that are there."""
        lines = self.text(stage).splitlines()
        words = [word for line in lines for word in re.split(r"[\s\[\]{},:\"']+", line.partition("#")[0])]
        paths = [here_or_embedded(word) for word in words if "/" in word or "." in word]
        return [path for path in paths if path.parts[:1] != ("outputs",) and path.parts and path.exists()]

    def description(self) -> str:
        """Return the heading of its README without its name, or an empty text."""
        readme = self.folder / "README.md"
        heading = readme.read_text(encoding="utf-8").partition("\n")[0] if readme.is_file() else ""
        return heading.removeprefix("#").strip().removeprefix(f"{self.name}:").strip()


def all_recipes() -> dict[str, Recipe]:
    """Return the recipes of the current folder and those that come with the project, by name."""
    folders = [folder for place in (HOME / RECIPES, RECIPES) for folder in sorted(place.glob("*"))]
    recipes = {folder.name: Recipe(folder) for folder in folders}
    return {name: recipe for name, recipe in sorted(recipes.items()) if recipe.rows}


def find_recipe(word: str) -> Recipe:
    """Return the recipe of this name, or in this folder if the word is a path.

    Raises:
        UserError: if there is none.
    """
    if "/" in word:
        recipe = Recipe(Path(word))
        if not recipe.rows:
            raise UserError(f"--recipe {word}: no folder with a recipe's YAML files (tokenizer.yaml, sft.yaml, ...)")
        return recipe
    recipes = all_recipes()
    if word not in recipes:
        raise UserError(f"--recipe {word}: no such recipe; {nearest(word, recipes)}")
    return recipes[word]


def find_launch_file(word: str) -> Path:
    """Return the file of accelerate's settings of this name, in the current folder or of the project.

    Raises:
        UserError: if there is none.
    """
    places = (HOME / RECIPES / LAUNCH_FILES, RECIPES / LAUNCH_FILES)
    files = {path.stem: path for place in places for path in sorted(place.glob("*.yaml"))}
    if word not in files:
        raise UserError(f"--launch {word}: no such launch file; {nearest(word, files)}")
    return files[word]


def copy_recipe(name: str, source: Recipe) -> Path:
    """Copy a recipe to `recipes/<name>/`, such that it writes to `outputs/<name>/`; return the new folder.

    Raises:
        UserError: if the name cannot be that of a folder, or the folder is there already.
    """
    if not NAME.fullmatch(name) or name == LAUNCH_FILES:
        raise UserError(f"{name}: not a name for a recipe; use letters, digits, - and _, as in: sandan init mine")
    folder = RECIPES / name
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: is there already; nothing was changed: give another name, or remove it")
    new = RECIPES / f".{name}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for row in source.rows:
        own = re.compile(rf"\b(outputs|annotations)/{re.escape(source.name)}(?![\w-])")
        text = own.sub(rf"\1/{name}", source.text(row.name))
        (new / f"{row.name}.yaml").write_text(text, encoding="utf-8")
    (new / "README.md").write_text(f"# {name}: a copy of {source.name}\n", encoding="utf-8")
    # Last, so that a copy which was stopped half way is not taken for a recipe.
    new.rename(folder)
    return folder
