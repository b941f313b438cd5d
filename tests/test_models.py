"""The bundled model, its task and recipe, and checkpoints with random weights."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

import workbench as wb
from workbench.models import addition, card, idefics, llama, paths, recipe, tokens

TINY = Path(str(wb.models.path("tiny")))
PROMPTS = ["1+1=", "47+58=", "9+8=", "123+4567=", "Hello, world!", "a"]


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the files ---


def test_tiny_is_small():
    weights = wb.models.state_dict("tiny")
    assert sum(tensor.numel() for tensor in weights.values()) == recipe.SHAPE.num_parameters <= 3_000_000
    assert (TINY / "model.safetensors").stat().st_size < 8_000_000
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == recipe.SHAPE.weights()


def test_tiny_was_written_by_this_recipe():
    assert json.loads((TINY / "config.json").read_text()) == recipe.SHAPE.config()


def test_every_printable_character_makes_the_round_trip():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = "".join(map(chr, range(32, 127))) + "\n\t  two  spaces "
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert ids == tokens.encode(text)
    assert (
        tokenizer("é\r<eos>")["input_ids"]
        == [tokens.UNK_ID, tokens.UNK_ID, tokens.EOS_ID]
        == [*tokens.encode("é\r"), tokenizer.eos_token_id]
    )


def test_importing_models_loads_no_torch():
    code = "import sys, workbench as wb; wb.models.path('tiny'); print({'torch', 'transformers', 'vllm', 'tokenizers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.strip() == "set()"


# --- what it says ---


def test_vllm_and_transformers_say_the_same(tmp_path):
    script = tmp_path / "greedy.py"
    script.write_text(
        textwrap.dedent("""
        import json, sys
        import vllm
        if __name__ == "__main__":
            model, prompts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
            llm = vllm.LLM(model, dtype="float32", enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=2**28)
            outputs = llm.generate(prompts, vllm.SamplingParams(temperature=0.0, max_tokens=48), use_tqdm=False)
            json.dump([[list(o.outputs[0].token_ids), o.outputs[0].text] for o in outputs], open(out, "w"))
    """)
    )
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(TINY), json.dumps(PROMPTS), str(tmp_path / "out.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "out.json").read_text())
    here = card.completions(TINY, PROMPTS, max_tokens=48, temperature=0.0)
    assert [ids for ids, _ in told] == here
    assert told[1][1] == "7+8=15;4+5+1=10;105" and here[1][-1] == tokens.EOS_ID


@pytest.mark.parametrize("num_digits, least, most", [(1, 0.80, 1.0), (2, 0.30, 0.60)])
def test_at_temperature_one_it_is_as_right_as_promised(num_digits, least, most):
    assert least < _accuracy(num_digits, temperature=1.0) < most


def test_greedily_it_knows_how_to_add():
    assert _accuracy(2, temperature=0.0) > 0.9


def _accuracy(num_digits: int, *, temperature: float) -> float:
    from transformers import AutoTokenizer

    prompts = [problem.prompt for problem in addition.sample_problems(300, num_digits=num_digits, seed=5)]
    rows = card.completions(TINY, prompts, max_tokens=64, temperature=temperature, seed=5)
    texts = AutoTokenizer.from_pretrained(TINY).batch_decode(rows, skip_special_tokens=True)
    return sum(map(addition.reward, prompts, texts)) / len(prompts)


def test_samples_differ_grow_with_the_numbers_and_some_are_cut():
    lengths = {}
    for num_digits in (1, 4):
        prompts = [problem.prompt for problem in addition.sample_problems(100, num_digits=num_digits, seed=6)]
        lengths[num_digits] = [len(row) for row in card.completions(TINY, prompts, max_tokens=64, seed=6)]
    assert sum(lengths[4]) > 2.5 * sum(lengths[1])
    assert max(lengths[4]) == 64 and len(set(lengths[4])) > 5
    assert len(set(map(tuple, card.completions(TINY, ["47+58="] * 8, max_tokens=24)))) >= 2


# --- the card ---


def test_the_card_is_printed_and_belongs_to_this_recipe(capsys):
    assert card.main([]) == 0
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ") and line[2].isdigit()]
    accuracy = {int(row[0].strip("| ")): float(row[1].strip(" %")) / 100 for row in rows}
    assert accuracy[1] > 0.8 and 0.3 < accuracy[2] < 0.6 and set(accuracy) == {1, 2, 3, 4}
    score = card.Score(num_digits=1, accuracy=0.0, greedy_accuracy=0.0, pupil_accuracy=0.0, lengths_tokens=(0,) * 1000)
    assert _without_rows(printed) == _without_rows(card.model_card([score]))


def _without_rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if not (line.startswith("| ") and line[2].isdigit())]


def test_a_score_counts_lengths():
    score = card.Score(num_digits=2, accuracy=0.5, greedy_accuracy=1.0, pupil_accuracy=0.5, lengths_tokens=(*range(1, 100), 200))
    assert (score.percentile(50), score.percentile(90), score.percentile(100)) == (51, 91, 200)
    assert (score.truncated_share(64), score.truncated_share(96)) == (0.36, 0.04)


def test_the_card_is_measured_again(tmp_path, capsys):
    folder = wb.models.make_dummy(tmp_path / "dummy", num_parameters=200_000)
    assert card.main(["--measure", "--problems", "3", "--model", str(folder), "--write"]) == 0
    printed = capsys.readouterr().out
    assert "3 problems a row" in printed and "| 4 | 0.0% |" in printed and printed == (folder / "README.md").read_text()


# --- the task ---


@pytest.mark.parametrize(
    "text, answer",
    [
        ("7+8=15;4+5+1=10;105", 105),
        ("7+8=14;4+5+1=10;104?7+8=15;4+5+1=10;105", 105),
        ("7+8=15;4+5+1=10;105?", None),
        ("7+8=15;4+5+1=10;105?7+8=1", None),
        ("7+8=15;4+5+1=10;", None),
        ("105", None),
        ("7;²", None),
        ("", None),
    ],
)
def test_the_last_finished_answer_counts(text, answer):
    assert addition.answer_of(text) == answer
    assert addition.reward("47+58=", text) == float(answer == 105)


def test_only_additions_can_be_right():
    with pytest.raises(ValueError, match=r"(?s)'what\?' is no addition.*'12\+7='.*sample_problems"):
        addition.is_right("what?", "1;1")


def test_problems_have_the_digits_asked_for_and_follow_the_seed():
    problems = addition.sample_problems(50, num_digits=(1, 3), seed=4)
    assert {problem.num_digits for problem in problems} == {1, 3} == {len(str(problem.a)) for problem in problems}
    assert problems == addition.sample_problems(50, num_digits=(1, 3), seed=4) != addition.sample_problems(50, num_digits=(1, 3), seed=5)
    assert addition.is_right(problems[0].prompt, f";{problems[0].answer}")


def test_a_careful_pupil_is_right_and_a_careless_one_as_often_as_the_slips_say():
    rng = random.Random(0)
    careful = addition.Pupil(slip_alone=0.0, slip=0.0, doubt_right=0.0, doubt_wrong=0.0)
    assert careful.work(addition.Problem(a=958, b=47), rng) == "8+7=15;5+4+1=10;9+0+1=10;1005"
    assert careful.work(addition.Problem(a=0, b=0), rng) == "0+0=0;0"
    problems = addition.sample_problems(4000, num_digits=2, seed=0)
    careless = addition.Pupil(slip_alone=0.0, slip=0.3, doubt_right=0.0, doubt_wrong=0.0)
    right = sum(addition.reward(problem.prompt, careless.work(problem, rng)) for problem in problems) / 4000
    assert right == pytest.approx(0.7**2, abs=0.03)
    doubting = addition.Pupil(slip_alone=0.0, slip=0.0, doubt_right=0.5, doubt_wrong=0.0, max_attempts=3)
    attempts = Counter(doubting.work(problem, rng).count("?") + 1 for problem in problems)
    assert set(attempts) == {1, 2, 3} and attempts[1] / 4000 == pytest.approx(0.5, abs=0.03)


# --- the recipe ---


def test_batches_label_completions_only_and_are_of_one_size():
    import itertools

    for inputs, labels in itertools.islice(recipe.batches(recipe.Recipe(batch_tokens=512, shuffle_batches=4)), 6):
        assert inputs.shape == labels.shape and 300 < inputs.numel() <= 512
        for row, told in zip(inputs.tolist(), labels.tolist(), strict=True):
            start = row.index(tokens.VOCABULARY["="]) + 1
            end = row.index(tokens.EOS_ID) + 1
            assert told[:start] == [-100] * start and told[start:end] == row[start:end] and set(told[end:]) <= {-100}


@pytest.mark.slow
def test_the_recipe_learns_and_repeats_itself(tmp_path, monkeypatch):
    short = recipe.Recipe(num_steps=60, batch_tokens=1024)
    weights, losses = recipe.train(short, log_every=0)
    again, same = recipe.train(short, log_every=0)
    assert losses == same and all(bool((weights[name] == again[name]).all()) for name in weights)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    monkeypatch.chdir(tmp_path)
    assert recipe.main(["--steps", "2"]) == 0
    assert {file.name for file in (tmp_path / "tiny").iterdir()} == {file.name for file in TINY.iterdir()} - {"README.md"}


# --- random weights ---


@pytest.mark.parametrize("num_parameters", [150_000, 1_000_000, 7_000_000, 20_000_000])
def test_a_dummy_has_the_size_asked_for(tmp_path, num_parameters):
    folder = wb.models.make_dummy(tmp_path / "made" / "here", num_parameters=num_parameters)
    weights = wb.models.state_dict(folder)
    assert sum(tensor.numel() for tensor in weights.values()) == pytest.approx(num_parameters, rel=0.02)
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.float32"}
    config = json.loads((folder / "config.json").read_text())
    assert config["num_attention_heads"] % 2 == config["num_key_value_heads"] % 2 == config["intermediate_size"] % 2 == 0


def test_shapes_of_any_size_have_the_size_asked_for():
    from workbench.models.dummy import _shape_of

    sizes = [int(300_000 * 1.07**power) for power in range(160)]  # to 15,000 M
    assert max(abs(_shape_of(size, kind).num_parameters / size - 1) for size in sizes for kind in ("text", "vision")) < 0.02


def test_a_dummy_follows_its_seed_and_speaks_like_tiny(tmp_path):
    import torch

    one, two, other = (
        wb.models.make_dummy(tmp_path / name, num_parameters=200_000, seed=seed) for name, seed in (("1", 3), ("2", 3), ("3", 4))
    )
    first, second, third = (wb.models.state_dict(folder)["lm_head.weight"] for folder in (one, two, other))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert json.loads((one / "tokenizer.json").read_text()) == json.loads((TINY / "tokenizer.json").read_text())
    said = card.completions(one, ["abc", "abd"], max_tokens=8, temperature=0.0)
    assert said == card.completions(two, ["abc", "abd"], max_tokens=8, temperature=0.0) and said[0] != said[1]


def test_transformers_finds_every_weight_where_it_belongs(tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for kind, loader in (("text", AutoModelForCausalLM), ("vision", AutoModelForImageTextToText)):
        folder = wb.models.make_dummy(tmp_path / kind, kind=kind)
        _, info = loader.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert sum(tensor.numel() for tensor in wb.models.state_dict(folder).values()) == pytest.approx(1_000_000, rel=0.02)


def test_a_vision_dummy_sees_its_images(tmp_path):
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = wb.models.make_dummy(tmp_path / "vision", kind="vision")
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    logits = []
    for colour in ("red", "blue"):
        images = [Image.new("RGB", (64, 48), colour), Image.new("RGB", (30, 30), "white")]
        inputs = processor(text=["<image><image>two"], images=[images], return_tensors="pt")
        assert (inputs["input_ids"] == tokens.VOCABULARY["~"] + 1).sum() == 8 and inputs["pixel_values"].shape == (1, 2, 3, 56, 56)
        logits.append(model(**inputs).logits[0, -1].detach())
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_a_dummy_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(wb.ModelError, match=r"(?s)kind 'audio'.*text, vision.*pass one"):
        wb.models.make_dummy(tmp_path, kind="audio")
    for num_parameters in (-1, 1000):
        for kind in ("text", "vision"):
            text = rf"(?s)a {kind} model of {num_parameters:,} parameters\nthe smallest.* has \d+,\d+\nask for more"
            with pytest.raises(wb.ModelError, match=text):
                wb.models.make_dummy(tmp_path, num_parameters=num_parameters, kind=kind)


def test_shapes_count_their_weights():
    shape = llama.LlamaShape(num_layers=1, hidden_size=4, intermediate_size=6, num_heads=2, max_tokens=8, vocab_size=10)
    assert shape.num_parameters == 2 * 10 * 4 + 4 * 16 + 3 * 24 + 3 * 4
    assert idefics.IdeficsShape(text=shape).num_parameters > shape.num_parameters


# --- where models are ---


def test_bundled_names_folders_and_hub_names_are_found(tmp_path, monkeypatch):
    assert paths.bundled() == ("tiny",)
    assert TINY.is_dir() and wb.models.path(TINY) == wb.models.path(str(TINY)) == TINY
    (cached := tmp_path / "models--some--model" / "snapshots" / "abc").mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert wb.models.path("some/model") == "some/model"
    with pytest.raises(wb.ModelError, match=r"(?s)'other/model' is not here.*downloads are off"):
        wb.models.path("other/model")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert wb.models.path("other/model") == "other/model"
    with pytest.raises(wb.ModelError, match=r"(?s)has no weights here.*this is a hub name.*safetensors checkpoint"):
        wb.models.state_dict("some/model")


@pytest.mark.parametrize("name", ["no-such-model", "./tiny", "/no/such/folder", "a/b/c", "", "bad name!", "x" * 300, "tiny/"])
def test_an_unknown_model_is_named_beside_what_there_is(name):
    with pytest.raises(wb.ModelError) as caught:
        wb.models.path(name)
    text = str(caught.value)
    assert repr(name) in text and "bundled is tiny" in text and "owner/name" in text and isinstance(caught.value, ValueError)


def test_a_folder_that_is_no_model_is_told(tmp_path):
    with pytest.raises(wb.ModelError, match=r"(?s)no config.json\nit holds nothing\npass the folder"):
        wb.models.path(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert wb.models.path(tmp_path) == tmp_path
    with pytest.raises(wb.ModelError, match=r"(?s)no weights here\nlooked for \*\.safetensors in .*\npass"):
        wb.models.state_dict(tmp_path)
