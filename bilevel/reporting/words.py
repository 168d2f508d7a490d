"""What a run comes to, in sentences: what happened, how far to trust it, whether it overfits the validation data."""

from __future__ import annotations

from bilevel.reporting.runs import Seen
from bilevel.solution import Record

# A test loss counts as risen if that is more than this part of itself, and of what the validation loss fell meanwhile.
RISEN, OF_FALL = 0.01, 0.1
# A gain on the validation data of which less than this part is seen on the test data counts as overfitted.
KEPT = 0.5
# Validation examples for each hyperparameter below which a note says that they are few.
FEW = 10
TINY = 1e-6  # relative changes of a loss that are none


def in_short(run: Seen) -> list[str]:
    """Return what happened, a sentence or two for each question."""
    start, end = run.records[0], run.records[run.step]
    many = "1 hyperparameter was" if run.count == 1 else f"{run.count:,} hyperparameters were"
    went = _went(start.outer_loss, end.outer_loss)
    lines = [f"{many} tuned in {_steps(len(run.records) - 1)}. The validation loss {went}."]
    tested = _tested(run)
    if len(tested) > 1:
        first, last, lowest = tested[0], tested[-1], min(tested, key=_test)
        said = f"The test loss {_went(_test(first), _test(last))}"
        if lowest.step not in (first.step, last.step):
            said += f"; it was lowest, {_test(lowest):.4g}, at step {lowest.step}"
        lines.append(f"{said}.")
    lines.append(
        f"Why it ended: {run.status}."
        if run.status
        else f"The run goes on, or was killed: step {run.records[-1].step} is the last one that is known."
    )
    lines += run.context.get("notes", [])
    lines.append(_trust(run))
    lines.append(
        f"It took {sum(r.gradients for r in run.records):,} gradients and {sum(r.products for r in run.records):,} "
        f"Hessian-vector products, {_duration(sum(r.seconds for r in run.records))} in all."
    )
    return lines


def warnings(run: Seen) -> list[str]:
    """Return what is wrong: hypergradients that cannot be trusted, signs that the validation data are overfitted."""
    found = []
    if run.certificate is not None and not run.certificate.trusted:
        found.append(f"The last hypergradient cannot be trusted: {'; '.join(run.certificate.reasons)}.")
    return [*found, *overfitted(run)]


def overfitted(run: Seen) -> list[str]:
    """Return the signs that the hyperparameters have fitted the noise of the validation data."""
    tested, cure = (
        _tested(run),
        "Fewer hyperparameters, more validation data (cross-validation), or solve(patience=...) help.",
    )
    if len(tested) > 1:
        first, last, lowest = tested[0], tested[-1], min(tested, key=_test)
        gain, kept = first.outer_loss - last.outer_loss, _test(first) - _test(last)
        risen, fell = _test(last) - _test(lowest), lowest.outer_loss - last.outer_loss
        noise = TINY * abs(_test(last))
        if fell > 0.0 and risen > max(RISEN * abs(_test(lowest)), OF_FALL * fell):
            return [
                f"The validation data are being overfitted: since step {lowest.step} the validation loss fell from "
                f"{lowest.outer_loss:.4g} to {last.outer_loss:.4g} while the test loss rose from {_test(lowest):.4g} "
                f"to {_test(last):.4g}. {cure}"
            ]
        if gain > noise and kept < KEPT * gain:
            return [
                f"The validation data are being overfitted: the validation loss gained {gain:.4g}, the test loss "
                f"{kept:.4g}, less than half of it. {cure}"
            ]
        return []
    return _few(run)


def _few(run: Seen) -> list[str]:
    examples = run.context.get("samples", {}).get("validation")
    if not examples or run.count < 2 or examples >= FEW * run.count:
        return []
    return [
        f"{run.count:,} hyperparameters are chosen by {examples:,} validation examples, and can fit their noise. No "
        "third split shows whether they do: give BilevelProblem test_data= or test_loss=."
    ]


def _trust(run: Seen) -> str:
    verdicts = [record.verdict for record in run.records]
    if len(verdicts) == 1:
        return f"Its one hypergradient is {verdicts[0]}."
    errors = [record.error for record in run.records if record.error is not None]
    known = f", with an estimated relative error of at most {max(errors):.1g}" if errors else ""
    untrusted = [record.step for record in run.records if record.verdict == "untrusted"]
    if untrusted:
        part = f"{len(untrusted)} of {len(verdicts)}"
        return f"{part} hypergradients cannot be trusted, the first one at step {untrusted[0]}."
    if "approximate" in verdicts:
        return f"All {len(verdicts)} hypergradients can be trusted as approximations{known}."
    return f"All {len(verdicts)} hypergradients are exact{known}."


def _tested(run: Seen) -> list[Record]:
    """Return the records up to the point that was returned which have a test loss."""
    return [record for record in run.records[: run.step + 1] if record.test_loss is not None]


def _test(record: Record) -> float:
    assert record.test_loss is not None
    return record.test_loss


def _went(before: float, after: float) -> str:
    if abs(after - before) <= TINY * abs(before):
        return f"stayed at {after:.4g}"
    share = f" (by {100 * abs(after - before) / abs(before):.2g} %)" if before else ""
    return f"{'fell' if after < before else 'rose'} from {before:.4g} to {after:.4g}{share}"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"


def _duration(seconds: float) -> str:
    if seconds < 120.0:
        return f"{seconds:.3g} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200.0 else f"{seconds / 3600:.1f} hours"
