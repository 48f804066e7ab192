"""Push a recipe's results to the Hub: tokenizer, models, preference data, each with a card of measured results.

    python scripts/push.py --recipe_dir outputs/tiny --hub_id alice/tiny

Repositories are private by default. Only files of an allow-list are sent, none of them pickled and none of them code,
and only after all of them were searched for secrets. After a failed push, run the same command again: files that have already arrived are
not sent again.
"""

import fnmatch
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError, safe_open

from ..core.chain import STAGES
from ..core.credentials import SECRETS
from ..core.errors import UserError
from ..core.places import command_for
from ..core.stage import RESULT, read_result
from ..models.loading import CODE_ENTRIES, check_adapter, check_weights, first_line, read_settings
from .cards import model_card


if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Files that may be pushed; `STAYS_HOME` below lists those that are skipped silently. Any other file stops the push.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "trainer_state.json",
    "recipe.yaml",
    RESULT,
)
# README.md is the card that the stage wrote; it says who judged.
DATA_FILES = (
    "preferences_train.jsonl",
    "preferences_eval.jsonl",
    "agreement.json",
    "README.md",
    "recipe.yaml",
    RESULT,
)
FOLDERS = ("value_model", "ema_policy", "adapter")
STAYS_HOME = ("training_args.bin", "checkpoint-*", "runs", ".*")

ATTEMPTS, WAIT_SECONDS = 4, 2.0


@dataclass
class Repository:
    """The files of one repository on the Hub.

    Args:
        repo_id: `owner/name`.
        kind: `model` or `dataset`.
        files: path in the repository -> local file, or content.
    """

    repo_id: str
    kind: str
    files: dict[str, Path | bytes] = field(default_factory=dict)


# ---- Selecting files ----


def plan(recipe_dir: Path, hub_id: str, license_name: str | None) -> list[Repository]:
    """Return the repositories of a recipe's finished stages, with cards.

    Raises:
        UserError: if nothing is finished, a file is not on the allow-list, or a secret was found.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", hub_id):
        raise UserError(f"HUB_ID={hub_id}: expected OWNER/NAME, as in alice/tiny")
    finished = [stage for stage in STAGES if (recipe_dir / stage / RESULT).is_file()]
    for stage in finished:
        _refuse_link(recipe_dir / stage)
    results = {stage: read_result(recipe_dir / stage) for stage in finished}
    repositories = []
    for stage, row in STAGES.items():
        if stage in results and row.repository is not None:
            repo_id = f"{hub_id}-{row.repository}"
            repositories.append(one_stage(recipe_dir / stage, repo_id, results, stage, license_name))
    if not repositories:
        raise UserError(f"{recipe_dir}: no finished stage in it; run `{command_for('chain', recipe_dir.name)}` first")
    for repository in repositories:
        refuse_secrets(repository)
    return repositories


def one_stage(folder: Path, repo_id: str, results: dict[str, Any], stage: str, license_name: str | None) -> Repository:
    """Return one stage's repository; see [`plan`]."""
    kind = "dataset" if STAGES[stage].auto_class is None else "model"
    patterns = DATA_FILES if kind == "dataset" else (*MODEL_FILES, "README.md")
    _refuse_link(folder)
    repository = Repository(repo_id, kind, dict(_allowed(folder, patterns)))
    for name, path in repository.files.items():
        if name.endswith(("recipe.yaml", RESULT, "trainer_state.json")):
            repository.files[name] = path.read_bytes().replace(str(Path.home()).encode(), b"~")
        if name.endswith("config.json"):
            settings = read_settings(folder, name, {}) or {}
            if name.endswith("tokenizer_config.json"):
                _refuse_outside_files(path, settings)
            shown = _without_code(path)
            if shown != settings:
                repository.files[name] = json.dumps(shown, indent=2, ensure_ascii=False).encode()
    if STAGES[stage].auto_class not in (None, "AutoTokenizer"):
        for place in (folder, *(folder / inside for inside in FOLDERS if (folder / inside).is_dir())):
            if check_adapter(place, {}) is None:
                check_weights(place, {})
    if kind == "model":
        repository.files["README.md"] = model_card(repo_id, stage, results, license_name).encode()
    return repository


def _allowed(folder: Path, patterns: tuple[str, ...], inside: str = "") -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in STAYS_HOME):
            continue
        _refuse_link(path)
        if path.is_dir() and path.name in FOLDERS and not inside:
            yield from _allowed(path, patterns, f"{path.name}/")
        elif path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
            yield f"{inside}{path.name}", path
        else:
            raise UserError(f"{path}: is not a file that is pushed; move it out of the folder")


def _refuse_link(path: Path) -> None:
    """Refuse a link: what lies behind it may be anything of this machine, and another thing tomorrow."""
    if path.is_symlink():
        raise UserError(f"{path}: is a link; only real files and folders are pushed")


def _without_code(path: Path) -> Any:
    """Return the settings in a JSON file without the entries that name code, at any depth."""

    def kept(entries: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entries.items() if name not in CODE_ENTRIES}

    return json.loads(path.read_text(encoding="utf-8"), object_hook=kept)


def _refuse_outside_files(path: Path, settings: dict[str, Any]) -> None:
    """Raise [`UserError`] if a tokenizer's settings name a file outside its folder.

    The next user who loads the tokenizer would read that file on their own machine, and could publish it.
    """
    for key, value in settings.items():
        if (
            key.endswith("_file")
            and isinstance(value, str)
            and (Path(value).is_absolute() or ".." in Path(value).parts)
        ):
            raise UserError(f"{path}: {key}: {value}: names a file outside of the folder; remove the entry")


def refuse_secrets(repository: Repository) -> None:
    """Raise [`UserError`] if a file to be pushed seems to hold a secret. The message never shows the secret."""
    own = os.environ.get("HF_TOKEN")
    patterns = SECRETS | ({"your own token": re.escape(own)} if own else {})
    for name, source in repository.files.items():
        try:
            for place, text in _texts(name, _content(source)):
                for what, pattern in patterns.items():
                    if re.search(pattern, text):
                        raise UserError(f"{repository.repo_id}: {place}: holds {what}; nothing was pushed")
        except (SafetensorError, yaml.YAMLError, ValueError, RecursionError) as error:
            kind = PurePath(name).suffix.removeprefix(".")
            problem = f"no valid {kind} file: {first_line(error)}; nothing was pushed"
            raise UserError(f"{repository.repo_id}: {name}: {problem}") from error


def _content(source: Path | bytes) -> str:
    """Return the text of a file; of safetensors the header, a JSON object, as only numbers follow it.

    Raises:
        SafetensorError: if that header is broken, or the file is not whole.
    """
    if isinstance(source, Path) and source.suffix == ".safetensors":
        # The library compares the header's length with its own limit and with the file's size.
        with safe_open(source, "numpy"), source.open("rb") as stream:
            return stream.read(int.from_bytes(stream.read(8), "little")).decode()
    content = source if isinstance(source, bytes) else source.read_bytes()
    return content.decode(errors="replace")


def _texts(name: str, content: str) -> Iterator[tuple[str, str]]:
    """Yield the texts of a file, with their places: its lines as written, and the values that a parser makes of them.

    A token may be written with escapes (JSON, YAML) or be broken over lines (YAML).
    """
    lines = content.split("\n")
    for number, line in enumerate(lines, start=1):
        yield f"{name}:{number}", line
    if name.endswith((".json", ".safetensors")):
        yield name, "\n".join(_json_values(content))
    elif name.endswith(".jsonl"):
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{name}:{number}", "\n".join(_json_values(line))
    elif name.endswith(".yaml"):
        yield name, "\n".join(_yaml_values(content))
    elif front := re.match(r"---\n(.*?)\n---", content, re.DOTALL):
        yield name, "\n".join(_yaml_values(front[1]))


def _json_values(content: str) -> Iterator[str]:
    """Yield every key and text in a JSON document, also those of keys that are there twice."""
    rest = [json.loads(content, object_pairs_hook=list)]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, tuple)):
            rest.extend(value)


def _yaml_values(content: str) -> Iterator[str]:
    """Yield every scalar of a YAML document as it is read, and once more without the line breaks in it.

    YAML reads a break inside a scalar as a space, which would hide a token that is broken there.
    """
    for event in yaml.parse(content, yaml.SafeLoader):
        if isinstance(event, yaml.ScalarEvent):
            yield event.value
            yield re.sub(r"\\?\n\s*", "", content[event.start_mark.index : event.end_mark.index])


# ---- Pushing ----


def push(repositories: list[Repository], public: bool, api: "HfApi", say: Callable[[str], None]) -> None:
    """Create missing repositories and upload changed files, in one commit per repository.

    Raises:
        UserError: one line for a missing token or right, and for a Hub that cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd

    for number, repository in enumerate(repositories, start=1):
        repo_id, kind = repository.repo_id, repository.kind
        operations = [
            CommitOperationAdd(name, source if isinstance(source, bytes) else str(source))
            for name, source in repository.files.items()
        ]

        def send(repo_id: str = repo_id, kind: str = kind, operations: list = operations) -> None:
            api.create_repo(repo_id, repo_type=kind, private=not public, exist_ok=True)
            info = api.repo_info(repo_id, repo_type=kind)
            if not public and not info.private:
                raise UserError(f"{repo_id}: is public already; pass PUBLIC=1 to push to it all the same")
            api.create_commit(repo_id, operations, commit_message="Push from sandan", repo_type=kind)

        persistently(send, f"{repo_id} ({number} of {len(repositories)})")
        say(f"pushed {len(operations)} files to {api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}")


def persistently(action: Callable[[], None], what: str) -> None:
    """Run `action`; try again after a temporary fault. Files that were uploaded before it are not sent again.

    Raises:
        UserError: one line that says what to do.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except OfflineModeIsEnabled:
            raise UserError(f"{what}: HF_HUB_OFFLINE is set; unset it to push") from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403) or status < 500 and status != 429:
                raise UserError(f"{what}: {_advice(status, error)}") from None
            fault = f"the Hub answers {status}"
        except Exception as error:
            if not _is_network_fault(error):
                raise
            fault = " ".join(str(error).split())[:120] or type(error).__name__
        if attempt < ATTEMPTS:
            time.sleep(WAIT_SECONDS * 2 ** (attempt - 1))
    raise UserError(f"{what}: {fault}, {ATTEMPTS} times; run the same command again, it goes on from there")


def _is_network_fault(error: BaseException | None) -> bool:
    """Return whether the connection failed. (huggingface_hub has used several HTTP libraries.)"""
    if error is None:
        return False
    http = any(kind.__module__.startswith(("httpx", "requests")) for kind in type(error).__mro__)
    return http or isinstance(error, (ConnectionError, TimeoutError)) or _is_network_fault(error.__cause__)


def _advice(status: int, error: Exception) -> str:
    if status == 401:
        return "no valid token (401); set HF_TOKEN or run `hf auth login`"
    if status == 403:
        return "the token may not write there (403); use one with write access, or another HUB_ID"
    return f"the Hub refuses it ({status}): {' '.join(str(error).split())[:160]}"


def check_rights(repo_id: str | None, api: "HfApi | None" = None) -> str:
    """Return a sentence that says who is logged in and may write to `repo_id`. Nothing is changed on the Hub.

    Raises:
        UserError: if nobody is logged in, or the token may not write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    if not repo_id:
        raise UserError("push_to_hub: needs hub_model_id: OWNER/NAME")
    api, found = api or HfApi(), {}
    try:
        persistently(lambda: found.update(api.whoami()), repo_id)
    except LocalTokenNotFoundError:
        raise UserError(f"{repo_id}: nobody is logged in; set HF_TOKEN or run `hf auth login`") from None
    owners = [found["name"], *(organization["name"] for organization in found.get("orgs", []))]
    role = found.get("auth", {}).get("accessToken", {}).get("role")
    if repo_id.split("/")[0] not in owners or role == "read":
        raise UserError(f"{repo_id}: {found['name']}'s token may not write there; use one with write access")
    return f"{found['name']} may write to {repo_id}"
