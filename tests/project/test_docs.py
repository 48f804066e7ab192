"""Every command and every example of the docs, checked or run, so that what readers copy works."""

import ast
import gzip
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import ROOT, zoo
from helpers.checkout import environment, make, make_checkout, targets
from helpers.scripts import run_processes, run_script
from helpers.walk import PAGES

import sandan.run.cli
from sandan.core.chain import CHAIN
from sandan.run.config import StrictParser


DOCUMENTS = [
    "README.md",
    "README.ja.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    ".github/pull_request_template.md",
    "data/README.md",
    "docs/ppo.md",
    "docs/reliability.md",
    "docs/scaling.md",
    "docs/benchmarks.md",
    "docs/bad_inputs.md",
    "docs/migration.md",
    "docs/own_models_and_data.md",
    "docs/command.md",
    "docs/guide.md",
    "docs/guide.ja.md",
    "docs/index.md",
    "docs/reference.md",
    "docs/chat.md",
    *PAGES,
    "SECURITY.md",
    "docs/ranking.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("recipes/*/README.md")),
]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}

# What a test run takes off a documented command: sizes, never what the command is about.
TRAINER = "--use_cpu --bf16 false --max_steps 2 --per_device_train_batch_size 4 --dataloader_num_workers 0"
SMALLER = {
    "tokenizer": "--vocab_size 400",
    "pretrain": f"{TRAINER} --torch_compile false --block_size_tokens 32",
    "sft": f"{TRAINER} --torch_compile false",
    "reward": f"{TRAINER} --torch_compile false",
    "ppo": "--use_cpu --bf16 false --total_episodes 8 --per_device_train_batch_size 4 --per_device_eval_batch_size 8 "
    "--gradient_accumulation_steps 1 --response_length 8",
    "constraints": "--prompts_per_instruction 1",
    "evaluate": "--max_prompts 4 --max_new_tokens 8",
    "report": "",
}
SMALL_MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, *languages):
    """Contents of a document's fenced blocks of these languages, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", read(name), re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def documented_commands():
    """(place, command) of every command line in the documents and in the scripts' docstrings."""
    commands = [
        (name, line.strip())
        for name in DOCUMENTS
        for block in blocks(name, "bash", "sh", "console")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    for script in SCRIPTS:
        docstring = ast.get_docstring(ast.parse(read(f"scripts/{script}.py")))
        lines = docstring.replace("\\\n", " ").splitlines()
        commands += [
            (f"scripts/{script}.py", line.strip())
            for line in lines
            if line.strip().startswith(("accelerate launch", "python scripts/", "make "))
        ]
    return list(dict.fromkeys(commands))


def distinct(*kinds):
    """Documented commands whose first word is one of `kinds`, each once."""
    return list(dict.fromkeys(line for _, line in documented_commands() if line.split()[0] in kinds))


ACCELERATE = (".venv/bin/accelerate", "accelerate")
PYTHON = (".venv/bin/python", "python")
SANDAN = (".venv/bin/sandan", "sandan")
TRANSFORMERS = (".venv/bin/transformers",)
CHECKED = {"make", *ACCELERATE, *PYTHON, *SANDAN, *TRANSFORMERS}
# What make says to start a stage.
STARTS_STAGE = re.compile(r"(ACCELERATE_USE_CPU=true |\S*accelerate launch )")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with the files that the docs call `my_...`, and the recipe `english-small` cut to a toy's size."""
    folder = make_checkout(tmp_path_factory.mktemp("docs") / "checkout")
    questions = [f"What comes after number {number}?" for number in range(300)]
    answers = [f"Number {number + 1} comes after it." for number in range(300)]
    rows = list(zip(questions, answers, strict=True))
    files = {
        "my.jsonl": [{"text": f"{question} {answer}"} for question, answer in rows],
        "my_texts.jsonl.gz": [{"text": f"{question} {answer}"} for question, answer in rows],
        "my_pairs.jsonl": [{"prompt": question, "completion": answer} for question, answer in rows],
        "my_preferences.jsonl": [
            {"prompt": question, "chosen": answer, "rejected": "I do not care."} for question, answer in rows
        ],
        "my_prompts.jsonl": [{"prompt": question} for question in questions],
        "my_ifeval.jsonl": [
            {"prompt": "Count to three.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        ],
    }
    for name, content in files.items():
        with (gzip.open if name.endswith(".gz") else open)(folder / name, "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in content)
    recipe = folder / "recipes" / "english-small" / "pretrain.yaml"
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    settings["model_config"] |= SMALL_MODEL | {"num_key_value_heads": 2}
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    # `make -n seeds` really copies the report of the runs that it only pretends to make.
    report = folder / "outputs" / "tiny" / "report"
    report.mkdir(parents=True)
    (report / "report.json").write_text("{}")
    return folder


@pytest.fixture
def specs(monkeypatch):
    """`specs("sft")` are the dataclasses that scripts/sft.py passes to `sandan.run.cli.run`."""

    def capture(script):
        captured = []
        monkeypatch.setattr(
            sandan.run.cli, "run", lambda main, *specs, preview=None, **_: captured.append((specs, preview))
        )
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
        ((specs, preview),) = captured
        return [*(sandan.run.cli._load(spec) for spec in specs), sandan.run.cli.options_of(preview)]

    return capture


def launched(words, checkout):
    """Script and its arguments of a stage's command; where it is `accelerate launch`, its configuration is a valid file."""
    if words[0] == "ACCELERATE_USE_CPU=true":
        assert words[1] == ".venv/bin/python"
        return Path(words[2]).stem, words[3:]
    assert words[1] == "launch"
    assert words[2] == "--config_file"
    load_config_from_file(str(checkout / words[3]))
    # Without it the launcher prints a traceback of its own below the script's one line.
    words = [word for word in words if word != "--quiet"]
    script = Path(words[4])
    assert script.parent == Path("scripts")
    assert script.stem in SCRIPTS
    return script.stem, words[5:]


def parse(specs, script, arguments):
    """Parse as the script does. Of a GPU recipe only the precision is changed, which this machine may lack."""
    parser = StrictParser(specs(script))
    return parser.parse([*arguments, *(["--bf16", "false"] if "bf16" in parser.hints else [])])


# ---------------------------------------------------------------------------------------------------------- commands


def test_every_kind_of_command_is_checked():
    unknown = [(place, line) for place, line in documented_commands() if line.split()[0] not in CHECKED]
    assert not unknown, f"no test of this file checks {unknown}"


def test_every_document_is_found():
    found = [path for pattern in ("*.md", "[!.]*/*.md", "*/*/*.md") for path in ROOT.glob(pattern)]
    ignored = (".venv", "outputs", ".pytest_cache", ".bench", "annotations")
    names = {str(path.relative_to(ROOT)) for path in found if path.relative_to(ROOT).parts[0] not in ignored}
    assert names | {".github/pull_request_template.md"} == set(DOCUMENTS)
    assert {"recipes/tiny/README.md", "recipes/english-small/README.md"} <= set(DOCUMENTS)
    assert {place for place, _ in documented_commands()} >= {f"scripts/{script}.py" for script in SCRIPTS}


@pytest.mark.slow
@pytest.mark.parametrize("command", distinct("make"))
def test_make_command_is_accepted(checkout, specs, monkeypatch, command):
    arguments = shlex.split(command)[1:]
    goals = [word for word in arguments if "=" not in word]
    assert goals
    assert set(goals) <= set(targets())
    if "RECIPE=mine" in arguments:
        copy_recipe(checkout)
    done = make(checkout, "-n", *arguments)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(checkout)
    for line in dict.fromkeys(line for line in done.stdout.splitlines() if STARTS_STAGE.match(line)):
        parse(specs, *launched(shlex.split(line), checkout))
    for line in done.stdout.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith(".venv/bin/python scripts/"):
            words = shlex.split(line)
            parse(specs, Path(words[1]).stem, words[2:])


@pytest.mark.parametrize("command", distinct(*ACCELERATE))
def test_accelerate_command_is_parsed(checkout, specs, monkeypatch, command):
    monkeypatch.chdir(checkout)
    parse(specs, *launched(shlex.split(command), checkout))


@pytest.mark.parametrize("command", distinct(*TRANSFORMERS))
def test_transformers_command_is_parsed(command):
    from transformers.cli.transformers import app

    _, name, *arguments = shlex.split(command)
    app.commands[name].make_context(name, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("command", distinct(*PYTHON))
def test_python_command_runs_or_is_parsed(checkout, specs, monkeypatch, command):
    words = shlex.split(command)
    monkeypatch.chdir(checkout)
    if words[1].startswith("scripts/") and not {"--help", "--help_all"} & set(words):
        parse(specs, Path(words[1]).stem, words[2:])
        return
    script = words[1].startswith("scripts/")
    done = run_script(Path(words[1]).stem, *words[2:], cwd=checkout) if script else run_python(checkout, *words[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def run_python(checkout, *arguments, timeout=120):
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        cwd=checkout,
        env=environment() | OFFLINE,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )


def copy_recipe(checkout):
    """What the docs say about a recipe of one's own, once."""
    if not (checkout / "recipes" / "mine").exists():
        line = next(line for line in distinct(*SANDAN) if line.split()[1] == "init")
        run_sandan(checkout, *shlex.split(line)[1:])


def run_sandan(checkout, *arguments):
    done = run_python(checkout, "-m", "sandan.command", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", distinct(*SANDAN))
def test_sandan_command_runs_or_is_accepted(checkout, specs, monkeypatch, command):
    words = shlex.split(command)
    if "mine" in words:
        copy_recipe(checkout)
    if words[1] == "init":
        return
    runs_stages = words[1] in {*CHAIN, "chain", "demo", "check", "chat", "push"}
    out = run_sandan(checkout, *words[1:], *(["--plan"] if runs_stages else []))
    assert out
    monkeypatch.chdir(checkout)
    for line in out.splitlines() if runs_stages else ():
        words = [word for word in shlex.split(line) if word != "ACCELERATE_USE_CPU=true"]
        parse(specs, Path(words[1]).stem, words[2:])


def test_a_recipe_of_ones_own_writes_to_its_own_folder(checkout):
    copy_recipe(checkout)
    for path in (checkout / "recipes" / "mine").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "outputs/tiny" not in text
        assert yaml.safe_load(text)["output_dir"] == f"outputs/mine/{path.stem}"


def test_the_table_of_stages_is_the_chain():
    for name in ("docs/guide.md", "docs/guide.ja.md"):
        assert tuple(re.findall(r"^\| `make (\w+)` \|", read(name), re.MULTILINE)) == CHAIN


@pytest.mark.parametrize("name", DOCUMENTS)
def test_inline_make_targets_exist(name):
    mentioned = re.findall(r"`make ([a-z_-]+)", read(name))
    assert set(mentioned) <= set(targets())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_yaml_examples_hold_valid_keys(name, specs):
    keys = StrictParser(specs("sft")).hints
    for block in blocks(name, "yaml"):
        assert set(yaml.safe_load(block)) <= set(keys)


# ------------------------------------------------------------------------------------------------- really run (slow)


def own_data_commands():
    """(stage, line) of every documented make command of the recipe for own data, in order."""
    lines = [line for line in distinct("make") if "--data_files my" in line or "report RECIPE=english-small" in line]
    return [(line.split()[1], line) for line in sorted(lines, key=lambda line: CHAIN.index(line.split()[1]))]


@pytest.mark.slow
def test_own_data_runs_through_every_stage(checkout):
    commands = own_data_commands()
    assert [stage for stage, _ in commands] == ["tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate", "report"]
    for stage, line in commands:
        planned = make(checkout, "-n", *shlex.split(line)[1:]).stdout.splitlines()
        words = shlex.split(next(one for one in reversed(planned) if STARTS_STAGE.match(one)))
        script, arguments = launched(words, checkout)
        done = run_script(script, *arguments, *SMALLER[stage].split(), root=checkout, cwd=checkout)
        # Two steps teach nothing: the report may say so.
        assert done.returncode == 0 or (stage == "report" and done.returncode == 1), done.stderr[-3000:]
        result = json.loads((checkout / "outputs" / "english-small" / stage / "result.json").read_text())
        assert (result["stage"], result["recipe"]) == (stage, "english-small")
        own = re.search(r"my_\w+\.jsonl(\.gz)?", line)
        assert not own or own[0] in result["inputs"]
    assert json.loads((checkout / "outputs/english-small/report/report.json").read_text())["comparison"]


@pytest.mark.slow
def test_own_data_of_the_docstrings_runs(checkout):
    commands = [line for line in distinct(*ACCELERATE) if "--data_files my" in line]
    assert commands
    for line in commands:
        script, arguments = launched(shlex.split(line), checkout)
        done = run_script(script, *arguments, *SMALLER[script].split(), root=checkout, cwd=checkout)
        assert done.returncode == 0, done.stderr[-3000:]
        output = arguments[arguments.index("--output_dir") + 1]
        assert (checkout / output / "result.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    # What the walk through the steps shows runs in its notebook: test_how_it_works.py.
    list(dict.fromkeys(block for name in DOCUMENTS if name not in PAGES for block in blocks(name, "python"))),
)
def test_python_example_runs(tmp_path, block):
    # A folder of this name stands for the model on the Hub.
    for name in re.findall(r'model="(\w+/[\w.-]+)"', block):
        zoo.write("one token for all", tmp_path / name)
    (tmp_path / "example.py").write_text(block, encoding="utf-8")
    done = run_processes([{}], tmp_path / "example.py", cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    if " at first" not in block:
        assert list((tmp_path / "outputs").glob("*/model.safetensors"))
        return
    first, last = map(float, re.search(r"([\d.]+) at first, ([\d.]+) at the end", done.stdout).groups())
    assert last > first + 0.1


# ------------------------------------------------------------------------------------------------ documents as such


# The pages in English and in Japanese.
TWINS = [("README.md", "README.ja.md"), ("docs/guide.md", "docs/guide.ja.md")]


@pytest.mark.parametrize("twins", TWINS)
def test_both_languages_have_the_same_commands(twins):
    languages = ("bash", "sh", "console", "python", "yaml")
    english, japanese = (blocks(name, *languages) for name in twins)
    assert english == japanese


@pytest.mark.parametrize("twins", TWINS)
def test_both_languages_have_the_same_shape(twins):
    shapes = []
    for name in twins:
        text = re.sub(r"^```.*?^```$", "", read(name), flags=re.MULTILINE | re.DOTALL)
        headings = re.findall(r"^(#+) ", text, re.MULTILINE)
        text = re.sub(r"<!-- results:begin -->\n(.*?)<!-- results:end -->", "", text, flags=re.DOTALL)
        items, cells = re.findall(r"^- ", text, re.MULTILINE), re.findall(r"^\|.*\|$", text, re.MULTILINE)
        # The pages in Japanese name each other where those in English do.
        targets = sorted({link.replace(".ja.md", ".md") for link in links(text)})
        shapes.append((headings, len(items), len(cells), targets))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_the_readme_has_results(name):
    assert re.search(r"<!-- results:begin -->\n\|.*?<!-- results:end -->", read(name), re.DOTALL)


@pytest.mark.parametrize("recipe", ["tiny", "english-small"])
def test_recipes_say_what_to_expect(recipe):
    assert re.search(
        r"<!-- expected:begin -->\n(.*?)<!-- expected:end -->", read(f"recipes/{recipe}/README.md"), re.DOTALL
    )


def links(text):
    """Targets of markdown links and images."""
    return {*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'(?:src|href)="([^"]+)"', text)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_exist(name):
    text = re.sub(r"^```.*?^```$", "", read(name), flags=re.MULTILINE | re.DOTALL)
    relative = [link.partition("#")[0] for link in links(text) if not re.match(r"https?://|#|mailto:", link)]
    missing = [link for link in relative if not os.path.exists((ROOT / name).parent / link)]
    assert not missing, f"{name}: {missing}"


def test_the_guide_names_files_and_folders_that_exist():
    for name in ("docs/guide.md", "docs/guide.ja.md"):
        for line in blocks(name, "text")[0].splitlines():
            place = line.split()[0]
            if place == "outputs/":
                continue
            assert list(ROOT.glob(re.sub(r"<\w+>", "*", place).rstrip("/"))), f"{name}: {place}"


@pytest.mark.slow
def test_programs_start_from_a_bare_shell():
    """One process asks each for its help: only what lies beside a program and src/ can be imported."""
    programs = [*sorted(ROOT.glob("benchmarks/[!_]*.py")), ROOT / "tests" / "helpers" / "faults.py"]
    programs = [str(path) for path in programs if "argparse" in path.read_text(encoding="utf-8")]
    assert len(programs) > 5
    done = subprocess.run(
        [sys.executable, "-c", ASKS_FOR_HELP, *programs],
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.count("usage: ") == len(programs)


ASKS_FOR_HELP = """
import runpy, sys
from pathlib import Path
from types import SimpleNamespace
for program in sys.argv[1:]:
    sys.argv, sys.path[0] = [program, "--help"], str(Path(program).parent)
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, program
"""


def test_the_site_has_every_page():
    nav = yaml.safe_load(read("mkdocs.yml"))["nav"]
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"'([^']+\.md)'", str(nav))) == pages


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("guide.md", "[scaling](scaling.md#slurm)", "[scaling](scaling.md#slurm)"),
        ("guide.md", "[README](../README.md)", "[README](index.md)"),
        (
            "guide.md",
            "[data](../data/README.md), [paper](https://arxiv.org/abs/1)",
            "data, [paper](https://arxiv.org/abs/1)",
        ),
        ("ppo.md", "[`code`](../src/sandan/ppo/trainer.py)", "`code`"),
        ("ppo.md", "[away](../../elsewhere.md)", "away"),
        ("ppo.md", "```py\nx[0](../y)\n```", "```py\nx[0](../y)\n```"),
        ("ppo.md", "```math\nx^2\n```", "$$\nx^2\n$$"),
    ],
)
def test_links_on_the_site_lead_to_its_pages(page, text, expected):
    hooks = runpy.run_path(str(ROOT / "docs" / "site" / "hooks.py"))
    assert hooks["on_page_markdown"](text, SimpleNamespace(file=SimpleNamespace(src_uri=page))) == expected
