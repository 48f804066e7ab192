"""`transformers serve` on a stage's folder, asked by the `openai` client: the chat template and the stop token are used."""

import os
import re
import runpy
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from helpers import ROOT
from helpers.browser import free_port

from sandan.models.rendering import encode_conversation, encode_prompts
from sandan.models.sampling import stream_completion
from sandan.models.tokens import find_stop_tokens, save_stop_tokens


openai = pytest.importorskip("openai", reason="pip install 'transformers[serving]' openai")
pytest.importorskip("uvicorn", reason="pip install 'transformers[serving]' openai")


TURNS = [{"role": "user", "content": "What does the cow eat?"}]
ANSWER = "It eats 草 and grass."


@pytest.fixture
def served(model, tokenizer, tmp_path):
    """A model that has learned one answer, in a folder as a stage saves it, served: (client, name of the model)."""
    ids, labels = encode_conversation(tokenizer, [*TURNS, {"role": "assistant", "content": ANSWER}])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_stop_tokens(model, tokenizer, find_stop_tokens(tokenizer, model.generation_config))
    model.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    port, name = free_port(), str(tmp_path / "sft")
    serve = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", serve, "serve", name, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([*command, "--device", "cpu"], env=os.environ, stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, process.stderr.read().decode()
                time.sleep(0.1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none"), name
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_the_openai_client_gets_what_was_learned(served, model, tokenizer):
    client, name = served
    assert stream_completion(model, tokenizer, TURNS, 40, 0, 0, len).text == ANSWER
    asked = {"model": name, "messages": TURNS, "temperature": 0, "max_tokens": 40}
    answer = client.chat.completions.create(**asked)
    assert answer.usage.prompt_tokens == len(encode_prompts(tokenizer, [TURNS])[0])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ANSWER, "stop")
    streamed = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**asked, stream=True)]
    assert "".join(streamed) == ANSWER and len(streamed) > 3


@pytest.mark.slow
def test_the_example_of_the_docs_runs(served, tmp_path, capsys):
    client, name = served
    (example,) = re.findall(r"^```py\n(.*?)^```$", (ROOT / "docs" / "chat.md").read_text(), re.MULTILINE | re.DOTALL)
    example = example.replace("http://127.0.0.1:8000/v1", str(client.base_url)).replace("outputs/tiny/ppo", name)
    (tmp_path / "example.py").write_text(example)
    runpy.run_path(str(tmp_path / "example.py"))
    assert capsys.readouterr().out == f"{ANSWER} stop\n"
