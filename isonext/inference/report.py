"""What came of a job, and what is printed of it."""

from dataclasses import dataclass, field

from isonext.flow.certificate import likely_cause
from isonext.inference.plan import Plan
from isonext.utils import distributed


@dataclass
class Report:
    """What came of a job."""

    done: int = 0  # pictures
    nfe: int = 0  # network evaluations a picture, of the last batch
    notes: list[str] = field(default_factory=list)
    unsolved: list[str] = field(default_factory=list)  # pictures whose fixed point did not converge
    residual: float = 0.0  # the largest
    skipped: list[str] = field(default_factory=list)  # one line a bad picture

    def include(self, other: "Report") -> None:
        """Take in another process's."""
        self.done += other.done
        self.nfe = self.nfe or other.nfe
        self.residual = max(self.residual, other.residual)
        for name in ("notes", "unsolved", "skipped"):
            setattr(self, name, sorted(getattr(self, name) + getattr(other, name)))


def combine_reports(report: Report, plan: Plan) -> Report:
    """The report of all processes together, and in the plan their certificate."""
    for lines in (report.notes, report.unsolved, report.skipped):
        lines.sort()  # whatever the order of the batches was
    (report, plan.certificate), *others = distributed.gather((report, plan.certificate))
    for other, certificate in others:
        report.include(other)
        if certificate:
            plan.certificate.include(certificate)
    return report


def print_plan(plan: Plan) -> None:
    settings, styles = plan.settings, plan.pipeline.spec.styles
    titles = plan.targets[0].title if len(plan.targets) == 1 else f"{len(plan.targets)} styles"
    guidance = "no guidance" if settings.cfg_scale == 1 else f"{settings.guidance} guidance {settings.cfg_scale:g}"
    strength = f"strength {round(settings.reached, 2):g}"
    strength = strength if plan.min_structure is None else f"structure {plan.min_structure:g} or more"
    legs = f"{settings.method}, {settings.num_steps} steps a leg"
    if settings.method == "map":
        steps = "1 step" if settings.num_steps == 1 else f"{settings.num_steps} steps"
        legs, guidance = f"map, one leg of {steps}", guidance.removeprefix(f"{settings.guidance} ")
    print(f"{styles[plan.source]} -> {titles}: {legs}, {guidance}, {strength}")


def print_report(report: Report, plan: Plan, seconds: float, remark: str) -> None:
    if report.done:
        picture_s = seconds / report.done
        print(f"{report.done} made, {report.nfe} network evaluations and {picture_s:.2f} s a picture on "
              f"{plan.pipeline.device}{remark}")  # fmt: skip
    else:
        print(f"0 made{remark}")
    for note in report.notes:
        print(note)
    if plan.settings.inversion == "fixed_point":
        verdict = f"all of them within {plan.settings.tolerance:g}"
        if report.unsolved:
            verdict = f"not certified, {len(report.unsolved)} did not converge: {', '.join(report.unsolved)}"
        print(f"fixed point: largest residual {report.residual:.2g}, {verdict}")


def certificate_status(plan: Plan, status: int) -> int:
    if plan.certificate is None:
        return status
    print(plan.certificate.line(likely_cause(plan.settings)))
    return status if plan.certificate.exact or not plan.certificate.elements else 3
