"""generate and demo with --device-graphs: all ranks in one process, judged by Hugging Face."""

import re

import pytest
from nxdi_deepseek.accuracy.reference import hugging_face_model, reference_logits
from nxdi_deepseek.cli import main
from nxdi_deepseek.example_configs import WIDE_CONFIG
from support.device_graphs import written


def test_generate_runs_the_graphs_of_64_ranks(tmp_path, capsys):
    model_dir = written(tmp_path, WIDE_CONFIG)
    prompt = [5, 9, 2, 77]
    options = ["--prompt-ids", ",".join(map(str, prompt)), "--max-new-tokens", "6", "--dtype", "float32"]
    assert main(["generate", str(model_dir), *options, "--device-graphs", "--tp-degree", "64"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"context_encoding_model 64: [\d,]+ instructions; .*all-reduce.*lowered in", output)
    assert "token_generation_model 64" in output
    tokens = [int(token) for token in output.strip().splitlines()[-1].split()]
    logits = reference_logits(hugging_face_model(model_dir), prompt + tokens)[len(prompt) - 1 : -1]
    assert tokens == logits.argmax(-1).tolist()


def test_sizes_that_nxd_refuses_are_one_line(tmp_path, capsys):
    model_dir = written(tmp_path, WIDE_CONFIG)
    options = ["--prompt-ids", "5,9", "--seq-len", "100", "--max-new-tokens", "2", "--tp-degree", "64"]
    assert main(["generate", str(model_dir), *options, "--device-graphs"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_demo_matches_hugging_face_at_2_and_64_ranks(capsys):
    assert main(["demo", "--device-graphs", "--max-new-tokens", "8"]) == 0
    output = capsys.readouterr().out
    assert output.count("verdict: MATCH") == 2
    assert "device graphs of 2 ranks" in output and "device graphs of 64 ranks" in output


@pytest.mark.parametrize("command", [["generate", "folder", "--prompt-ids", "1"], ["demo"]], ids=lambda it: it[0])
def test_the_option_is_not_abbreviated(command, capsys):
    """The process would have chosen another backend by then."""
    with pytest.raises(SystemExit):
        main([*command, "--device"])
    assert "unrecognized arguments: --device" in capsys.readouterr().err
