"""`xshare calibrate`: what it measures, what it chooses, and what it says where it cannot."""

import json

import pytest
from click.testing import CliRunner

from xshare_trtllm import XShareConfig
from xshare_trtllm.cli import main
from xshare_trtllm.evaluation import MODEL_DIR, held_out, load_model, teacher_forced, token_bytes
from xshare_trtllm.evaluation.calibrate import Point, calibrate, choose, read_pieces
from xshare_trtllm.hf import attach


def point(coverage, batch, loss, half_width=0.001):
    interval = (loss - half_width, loss + half_width)
    return Point(coverage, batch, 30.0, 50.0, loss, interval, -loss, (-loss, -loss))


SWEEP = [point(0.99, 4, 0.0005), point(0.97, 4, 0.003), point(0.95, 4, 0.006), point(0.99, 16, 0.0006),
         point(0.97, 16, 0.0035), point(0.95, 16, 0.005)]  # fmt: skip


def test_the_largest_saving_inside_at_every_batch():
    assert choose(SWEEP, 100, 0.005).coverage == 0.97
    assert choose(SWEEP, 100, 0.0072).coverage == 0.95
    assert choose(SWEEP, 100, 0.0069).coverage == 0.97, "batch 4 ends at 0.7 %"


def test_too_little_text_is_said_with_how_much():
    few = choose(SWEEP, 20, 0.005)
    assert few.coverage is None and "at least 4 more" in few.reason
    wide = choose([point(0.99, 4, 0.001, half_width=0.004)], 100, 0.003)
    assert wide.coverage is None
    assert "about 300 more would tell" in wide.reason, "half the width wants four times the text"


def test_no_coverage_is_good_enough():
    none = choose([point(0.99, 8, 0.01)], 100, 0.005)
    assert none.coverage is None and "least loss is +1.00%, of coverage 0.99 at batch 8" in none.reason


@pytest.fixture(scope="module")
def loaded():
    return load_model()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": document.text}) for document in held_out()[:4]))
    return path


def test_pieces_are_the_text(loaded, tmp_path):
    _, tokenizer = loaded
    path = tmp_path / "a.txt"
    path.write_text(held_out()[0].text, encoding="utf-8-sig")
    pieces = read_pieces([path], tokenizer, 50)
    ids = tokenizer(held_out()[0].text, add_special_tokens=False)["input_ids"]
    expected = {(tokenizer.bos_token_id, *ids[s : s + 50]) for s in range(0, len(ids) - 49, 50)}
    assert {tuple(piece) for piece in pieces.tolist()} == expected
    with pytest.raises(ValueError, match="no piece of 100000"):
        read_pieces([path], tokenizer, 100000)
    (tmp_path / "b.jsonl").write_text('{"body": "x"}')
    with pytest.raises(ValueError, match=r"b\.jsonl: must be UTF-8 text, or JSON lines with a `text` each"):
        read_pieces([tmp_path / "b.jsonl"], tokenizer, 50)


def test_points_are_what_attach_measures(loaded, texts):
    model, tokenizer = loaded
    pieces = read_pieces([texts], tokenizer, 32)[:16]
    points = calibrate(model, pieces, (4, 8), (0.95, 0.8))
    assert [(p.coverage, p.batch) for p in points] == [(0.95, 4), (0.8, 4), (0.95, 8), (0.8, 8)]
    with attach(model, XShareConfig(coverage=0.8), prefill="stepwise") as attached:
        quality = teacher_forced(model, pieces.split(8), token_bytes(tokenizer))
    assert points[3].active == pytest.approx(sum(s.experts_after for s in attached.stats) / 4)
    with attach(model, XShareConfig(64), prefill="stepwise") as attached:
        own = teacher_forced(model, pieces.split(8), token_bytes(tokenizer))
    assert points[3].own == pytest.approx(sum(s.experts_before for s in attached.stats) / 4)
    assert points[3].loss == pytest.approx(float(quality.nats.sum() / own.nats.sum()) - 1, rel=1e-6)
    assert points[1].active < points[0].active < points[0].own < points[2].own
    with pytest.raises(
        ValueError, match="batch 32 needs as many pieces of text, there are 16: 16 are missing"
    ):
        calibrate(model, pieces, (32,))


def run(texts, out, *options):
    arguments = ["calibrate", "--model", str(MODEL_DIR), "--text", str(texts), "--length", "32"]
    return CliRunner().invoke(main, [*arguments, "--batch", "8", "--out", str(out), *options])


def test_command_writes_a_configuration(texts, tmp_path):
    out = tmp_path / "tuned.yaml"
    result = run(texts, out, "--coverage", "0.95", "--coverage", "0.9", "--max-loss", "8%")
    assert result.exit_code == 0, result.output
    assert XShareConfig.from_yaml(out) == XShareConfig(coverage=0.9)
    assert "active experts" in out.read_text()
    report = json.loads(out.with_suffix(".json").read_text())
    assert (report["coverage"], len(report["points"]), report["tokens_per_piece"]) == (0.9, 2, 32)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3, "nothing left aside"


def test_command_chooses_nothing_on_too_little(texts, tmp_path):
    out = tmp_path / "xshare.yaml"
    out.write_text("coverage: 0.99\n")
    result = run(texts, out, "--coverage", "0.9", "--max-loss", "0.0001%")
    assert result.exit_code == 1
    assert "no coverage of the sweep" in result.output or "more would tell" in result.output
    assert out.read_text() == "coverage: 0.99\n", "an earlier choice stays"
    assert "must be a share" in run(texts, out, "--max-loss", "half").output
