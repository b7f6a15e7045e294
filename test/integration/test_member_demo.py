"""NxDI's own inference_demo on every member, by its --model-type, in CPU mode: the judge's greedy tokens.

test_inference_demo.py has deepseek_v3 and kimi_k2.
"""

import sys

import pytest
from support import nxdi

nxdi.require_nxdi()

from nxdi_deepseek import cli  # noqa: E402
from support import members  # noqa: E402
from support.checkpoints import words, write_tokenizer  # noqa: E402
from support.members import MEMBERS  # noqa: E402
from support.models import V3  # noqa: E402

NEW_TOKENS = 8


@pytest.mark.parametrize("name", MEMBERS)
def test_generates_the_judges_tokens(tmp_path_factory, tmp_path, monkeypatch, capsys, name):
    folder = members.released(tmp_path_factory.getbasetemp())[name, 0]
    write_tokenizer(folder, V3["vocab_size"])
    prompts, tokens, _ = members.load_goldens(folder)
    nxdi.init_cpu_parallel()
    monkeypatch.setattr(sys, "argv", sys.argv)
    arguments = ["--model-type", MEMBERS[name]["model_type"], "--task-type", "causal-lm", "run", "--on-cpu"]
    arguments += ["--torch-dtype", "float32", "--model-path", str(folder), "--compiled-model-path", str(tmp_path)]
    arguments += ["--batch-size", "1", "--seq-len", str(len(prompts[0]) + NEW_TOKENS), "--prompt", words(prompts[0])]
    assert cli.main(["inference-demo", *arguments]) == 0
    assert f"Output 0: {words(prompts[0] + tokens[0, :NEW_TOKENS].tolist())}\n" in capsys.readouterr().out
