"""Per-row comparisons of logits and embeddings, compared with torch, scipy, scikit-learn and values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import brier_score_loss, f1_score, log_loss
from torch.nn import functional as F

from peftlab.errors import DataError, VerificationError
from peftlab.evaluation import comparison as module
from peftlab.evaluation.calibration import Calibration
from peftlab.evaluation.comparison import Comparison
from peftlab.evaluation.embeddings import EmbeddingComparison

ROWS, V = 40, 11


def _logits(seed: int, num: int = ROWS, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 2 * torch.randn(num, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _targets(num: int = ROWS) -> torch.Tensor:
    return torch.randint(0, V - 2, (num,), generator=torch.Generator().manual_seed(9))


def _classes() -> Comparison:
    comparison = Comparison(ROWS, predicts="classes")
    comparison.add(_logits(1), _targets(), torch.arange(ROWS), _logits(2))
    return comparison


def test_comparison_kl_equals_torch_and_is_zero_for_equal_logits() -> None:
    student, teacher = _logits(1), _logits(2)
    expected = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert _classes().sums("kl") == pytest.approx(expected.numpy(), rel=1e-12)
    same = Comparison(ROWS, predicts="classes")
    same.add(teacher.float(), _targets(), torch.arange(ROWS), teacher.float())
    assert same.sums("kl").tolist() == [0.0] * ROWS
    # The other direction is another number: KL(teacher || model), not KL(model || teacher).
    reverse = F.kl_div(teacher.log_softmax(-1), student.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert abs(expected.sum() - reverse.sum()) > 0.1


def test_comparison_kl_in_float32_of_nearly_equal_logits_is_exact() -> None:
    """A plain sum of ``p log(p / q)`` loses the digits: its rounding errors are as large as the divergence."""
    rng = torch.Generator().manual_seed(3)
    teacher = torch.randn(20, 50_000, generator=rng)
    student = teacher + 1e-3 * torch.randn(20, 50_000, generator=rng)
    comparison = Comparison(20, predicts="tokens")
    comparison.add(student, torch.zeros(20, dtype=torch.int64), torch.arange(20), teacher)
    p, q = (x.double().log_softmax(-1) for x in (teacher, student))
    exact = (p.exp() * (p - q)).sum(-1).numpy()
    assert comparison.sums("kl") == pytest.approx(exact, rel=0.02)
    p, q = (x.log_softmax(-1) for x in (teacher, student))
    assert (p.exp() * (p - q)).sum(-1).numpy() != pytest.approx(exact, rel=0.02)


def test_comparison_ignores_absent_columns_and_gives_inf_for_a_missing_class() -> None:
    student, teacher = _logits(1), _logits(2)
    student[:, V - 2 :] = teacher[:, V - 2 :] = -math.inf
    wide, narrow = Comparison(ROWS, predicts="classes"), Comparison(ROWS, predicts="classes")
    wide.add(student, _targets(), torch.arange(ROWS), teacher)
    narrow.add(student[:, : V - 2], _targets(), torch.arange(ROWS), teacher[:, : V - 2])
    for name in ("nll", "brier", "kl", "agree"):
        assert wide.sums(name) == pytest.approx(narrow.sums(name), rel=1e-12)
    # Padding with 0 instead of -inf is another distribution.
    padded = Comparison(ROWS, predicts="classes")
    padded.add(student.nan_to_num(neginf=0.0), _targets(), torch.arange(ROWS), teacher)
    assert padded.sums("kl").sum() > wide.sums("kl").sum() + 0.1
    student[0, 0] = -math.inf
    lacking = Comparison(ROWS, predicts="classes")
    lacking.add(student, _targets(), torch.arange(ROWS), teacher)
    assert lacking.sums("kl")[0] == math.inf and np.isfinite(lacking.sums("kl")[1:]).all()
    assert lacking.estimates()["kl"].value == math.inf


def test_comparison_class_metrics_equal_scikit_learn() -> None:
    comparison, targets = _classes(), _targets().numpy()
    probabilities = _logits(1).softmax(-1).numpy()
    values = {name: estimate.value for name, estimate in comparison.estimates().items()}
    predictions = probabilities.argmax(-1)
    assert values == pytest.approx(
        {
            "loss": log_loss(targets, probabilities, labels=range(V)),
            "accuracy": np.mean(predictions == targets),
            "f1_macro": f1_score(targets, predictions, average="macro"),
            "brier": brier_score_loss(targets, probabilities, labels=range(V), scale_by_half=False),
            "agreement": np.mean(predictions == _logits(2).argmax(-1).numpy()),
            "kl": values["kl"],
        }
    )
    assert (
        comparison.predictions.tolist() == predictions.tolist() and comparison.references.tolist() == targets.tolist()
    )


def test_comparison_sums_do_not_depend_on_the_number_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.tensor([0, 2, 2, 2, 1, 1, 4, 0] * 5)
    whole = Comparison(5, predicts="tokens")
    whole.add(_logits(1), _targets(), row, _logits(2))
    parts = Comparison(5, predicts="tokens")
    monkeypatch.setattr(module, "_BLOCK", 3 * V)
    for part in (slice(0, 7), slice(7, 7), slice(7, 40)):
        parts.add(_logits(1)[part], _targets()[part], row[part], _logits(2)[part])
    for name in ("positions", "nll", "correct", "agree", "kl"):
        assert parts.sums(name) == pytest.approx(whole.sums(name), rel=1e-12)
    assert parts.calibration.ece() == pytest.approx(whole.calibration.ece(), rel=1e-12)
    expected = F.cross_entropy(_logits(1), _targets(), reduction="none")
    assert whole.sums("nll")[2] == pytest.approx(float(expected[row == 2].sum()))
    assert whole.sums("positions").tolist() == [10, 10, 15, 0, 5]


def test_comparison_token_metrics_equal_the_values_by_hand() -> None:
    """In row 0 both tokens are right, in row 1 one of two. Row 2 has no position and is no exact match."""
    sure, unsure = [math.log(0.8), math.log(0.2)], [math.log(0.5), math.log(0.5)]
    comparison = Comparison(3, predicts="tokens")
    comparison.add(torch.tensor([sure, sure, sure, unsure]), torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
    nats = -(2 * math.log(0.8) + math.log(0.2) + math.log(0.5)) / 4
    assert {name: estimate.value for name, estimate in comparison.estimates().items()} == pytest.approx(
        {"loss": nats, "perplexity": math.exp(nats), "token_accuracy": 3 / 4, "exact_match": 1 / 2}
    )


def test_comparison_memory_does_not_grow_with_the_vocabulary() -> None:
    comparison = Comparison(4, predicts="tokens")
    for _ in range(3):
        comparison.add(torch.zeros(4, 30_000), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    assert (
        sum(comparison.sums(name).nbytes for name in ("positions", "nll", "correct", "brier", "agree", "kl")) == 4 * 48
    )


def test_comparison_refuses_mistakes_of_the_caller() -> None:
    comparison, targets, rows = Comparison(ROWS, predicts="tokens"), _targets(), torch.arange(ROWS)
    with pytest.raises(ValueError, match=r"found \[\[40, 11\], \[39\], \[40\]\]"):
        comparison.add(_logits(1), targets[1:], rows)
    with pytest.raises(ValueError, match=r"expected rows in 0\.\.39, found 1\.\.40"):
        comparison.add(_logits(1), targets, rows + 1)
    with pytest.raises(DataError, match="found none: the evaluation data has no rows to score"):
        comparison.estimates()
    comparison.add(_logits(1), targets, rows, _logits(2))
    with pytest.raises(ValueError, match="teacher logits in every call or in none"):
        comparison.add(_logits(1), targets, rows)
    with pytest.raises(ValueError, match="expected classes"):
        _ = comparison.predictions


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_comparison_reports_a_model_that_diverged(value: float) -> None:
    logits = _logits(1)
    logits[3, 4] = value
    with pytest.raises(VerificationError, match="in the teacher's outputs on held-out rows: its training diverged"):
        Comparison(ROWS, predicts="tokens").add(_logits(2), _targets(), torch.arange(ROWS), logits)


def test_ece_equals_the_value_by_hand() -> None:
    """Two of 15 bins are used: confidence 0.9 and 0.92 with one of two right, and 0.5 twice with both right."""
    calibration = Calibration()
    calibration.add(np.array([0.9, 0.92, 0.5]), np.array([True, False, True]))
    calibration.add(np.array([0.5]), np.array([True]))
    assert calibration.ece() == pytest.approx(abs(1.0 - 1.82) / 4 + abs(2.0 - 1.0) / 4)
    assert math.isnan(Calibration().ece()) and math.isnan(Calibration().adaptive_ece())


def test_ece_bin_holds_its_upper_edge() -> None:
    """0.2 is the end of (2/15, 3/15]. In one bin with 0.15 the errors cancel; in two bins they would not."""
    calibration = Calibration()
    calibration.add(np.array([0.2, 0.15]), np.array([True, False]))
    assert calibration.ece() == pytest.approx(abs(1 - 0.35) / 2)


def test_ece_of_a_calibrated_and_an_overconfident_model() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.beta(8, 2, 40_000)
    honest, boasting = Calibration(), Calibration()
    honest.add(confidence, rng.random(40_000) < confidence)
    boasting.add(confidence, rng.random(40_000) < confidence - 0.1)
    for calibration, error in ((honest, 0.0), (boasting, 0.1)):
        assert calibration.ece() == pytest.approx(error, abs=0.012)
        assert calibration.adaptive_ece() == pytest.approx(error, abs=0.012)


def test_adaptive_ece_equals_that_of_15_equal_parts_of_sorted_predictions() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.beta(9, 1, 15_000)
    right = rng.random(15_000) < confidence**2
    calibration = Calibration()
    calibration.add(confidence, right)
    order = np.argsort(confidence)
    expected = np.mean([abs(right[p].mean() - confidence[p].mean()) for p in np.array_split(order, 15)])
    # A cell of 1/15,000 stays together, so a few of 1,000 predictions move to the next bin.
    assert calibration.adaptive_ece() == pytest.approx(expected, abs=1e-3)


def _vectors(num: int, noise: float, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    teacher = torch.randn(num, width, generator=rng)
    return 3 * (teacher + noise * torch.randn(num, width, generator=rng)), teacher


def _embeddings(student: torch.Tensor, teacher: torch.Tensor) -> EmbeddingComparison:
    comparison = EmbeddingComparison()
    for part in (slice(0, 7), slice(7, None)):
        comparison.add(student[part], teacher[part])
    return comparison


def test_embedding_comparison_equals_scipy_and_brute_force() -> None:
    student, teacher = _vectors(50, 0.7)
    values = {name: e.value for name, e in _embeddings(student, teacher).estimates().items()}
    s, t = (F.normalize(x.double()) @ F.normalize(x.double()).T for x in (student, teacher))
    upper = np.triu_indices(50, 1)
    recalls = [
        len(
            set(sorted(set(range(50)) - {i}, key=lambda j: -s[i, j])[:10])
            & set(t[i].argsort(descending=True)[1:11].tolist())
        )
        for i in range(50)
    ]
    assert values == pytest.approx(
        {
            "spearman": stats.spearmanr(s[upper], t[upper]).statistic,
            "neighbour_recall": np.mean(recalls) / 10,
            "cosine": float(F.cosine_similarity(student, teacher).mean()),
        },
        abs=1e-6,
    )


def test_embedding_spearman_of_a_draw_equals_scipy_on_repeated_pairs() -> None:
    """Texts 0 and 1 are the same text, so there are ties."""
    student, teacher = _vectors(12, 0.7)
    student[1], teacher[1] = student[0], teacher[0]
    statistic = _embeddings(student, teacher).statistics()["spearman"]
    s, t = ((F.normalize(x) @ F.normalize(x).T).numpy().round(6) for x in (student.double(), teacher.double()))
    for counts in np.random.default_rng(2).multinomial(12, np.ones(12) / 12, 5):
        i, j = np.triu_indices(12, 1)
        times = counts[i] * counts[j]
        expected = stats.spearmanr(np.repeat(s[i, j], times), np.repeat(t[i, j], times)).statistic
        assert statistic(counts[None].astype(float))[0] == pytest.approx(expected, abs=1e-6)


def test_embedding_comparison_of_a_rotated_space_differs_in_cosine_only() -> None:
    _, teacher = _vectors(600, 0.0)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))).Q
    values = {
        name: float(s(np.ones((1, 600)))[0]) for name, s in _embeddings(teacher @ turn, teacher).statistics().items()
    }
    # 600 texts have more pairs than the metric ranks.
    assert values["spearman"] == pytest.approx(1.0, abs=1e-4)
    assert values["neighbour_recall"] > 0.999 and abs(values["cosine"]) < 0.5
    other = {name: float(s(np.ones((1, 600)))[0]) for name, s in _embeddings(*_vectors(600, 50.0)).statistics().items()}
    assert abs(other["spearman"]) < 0.1 and other["neighbour_recall"] < 0.1


def test_embedding_comparison_of_other_widths_and_of_mistakes() -> None:
    student, teacher = _vectors(20, 0.5)
    assert set(_embeddings(student[:, :8], teacher).statistics()) == {"spearman", "neighbour_recall"}
    with pytest.raises(DataError, match="expected at least 3 texts to compare embeddings on, found 2"):
        _embeddings(student[:2], teacher[:2]).statistics()
    with pytest.raises(ValueError, match=r"expected two \[B, H\]"):
        _embeddings(student[:9], teacher)
    with pytest.raises(VerificationError, match="in those of the student"):
        _embeddings(student * math.nan, teacher)
