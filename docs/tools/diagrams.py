"""Draw the diagrams of the README and of docs/architecture.md as SVG, without a network or a package.

    python docs/tools/diagrams.py

Each file has its own background and follows the reader's colour scheme. `tests/docs/test_diagrams.py` compares the
committed files with this script, and the names of code in them (`NAMES`) with the tree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "pictures"
STYLE = """
text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, "Liberation Sans", sans-serif; fill: #1f2430; }
.code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace; }
.quiet { fill: #535b6b; } .strong { font-weight: 600; } .middle { text-anchor: middle; }
.card { fill: #ffffff; } .box { fill: #eef1fb; stroke: #7f8fd0; } .warm { fill: #fdf0e2; stroke: #d08a3c; }
.green { fill: #e4f4ec; stroke: #3f9a70; } .line { fill: none; stroke: #535b6b; stroke-width: 1.6; }
.head { fill: #535b6b; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e9f0; } .quiet { fill: #aab2c2; } .card { fill: #1e2129; }
  .box { fill: #2b3152; stroke: #8492d6; } .warm { fill: #47341f; stroke: #d99a52; }
  .green { fill: #1f4032; stroke: #57b58a; } .line { stroke: #aab2c2; } .head { fill: #aab2c2; }
}
"""
NAMES: set[str] = set()  # modules, classes and functions that a diagram shows


@dataclass
class Drawing:
    """An SVG under construction, in pixels."""

    width: int
    height: int
    label: str
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, size: int = 15, style: str = "") -> None:
        """Write one line whose baseline begins at (x, y), or is centred there with the style `middle`."""
        self.parts.append(f'<text x="{x}" y="{y}" font-size="{size}" class="{style}">{escape(words)}</text>')

    def code(self, x: float, y: float, name: str, size: int = 14, style: str = "") -> None:
        """Write the name of something in the tree."""
        NAMES.update(part.strip() for part in name.split("·"))
        self.text(x, y, name, size, f"code strong {style}")

    def box(self, x: float, y: float, width: float, height: float, style: str = "box") -> None:
        """Draw a rounded rectangle."""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" class="{style}"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw a line through the points that ends in an arrow head."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="line" marker-end="url(#head)"/>')

    def svg(self) -> str:
        """Return the whole file."""
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
            'orient="auto"><path d="M0,0 L8,4 L0,8 z" class="head"/></marker></defs>'
        )
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(self.label)}">\n'
            f"<style>{STYLE}</style>\n{head}\n"
            f'<rect width="{self.width}" height="{self.height}" rx="10" class="card"/>\n{body}\n</svg>\n'
        )


def equilibrium() -> Drawing:
    """Draw an explicit network beside an equilibrium layer."""
    label = "An explicit network keeps the activations of each layer; an equilibrium layer repeats one f and keeps z*."
    d = Drawing(600, 380, label)
    d.text(24, 36, "Explicit network", 18, "strong")
    d.text(24, 60, "L layers. Backpropagation keeps the activations of each.", 15, "quiet")
    d.text(24, 112, "x", 18)
    d.arrow((40, 106), (66, 106))
    for x, name in ((70, "f₁"), (170, "f₂"), (270, "f₃"), (430, "f_L")):
        d.box(x, 82, 64, 48)
        if name == "f_L":
            d.text(x + 25, 112, "f", 18)
            d.text(x + 31, 117, "L", 12)
        else:
            d.text(x + 32, 112, name, 18, "middle")
        d.box(x + 14, 142, 36, 16, "warm")
    for x in (134, 234):
        d.arrow((x, 106), (x + 33, 106))
    d.arrow((334, 106), (364, 106))
    d.text(382, 111, "…", 20, "middle")
    d.arrow((398, 106), (427, 106))
    d.arrow((494, 106), (526, 106))
    d.text(534, 112, "output", 16)
    d.text(382, 156, "…", 20, "middle")
    d.text(494, 155, "memory", 14, "quiet")
    d.text(24, 208, "Equilibrium layer", 18, "strong")
    d.text(24, 232, "One f, repeated until z stops changing. Memory holds one evaluation.", 15, "quiet")
    d.text(24, 312, "x", 18)
    d.arrow((40, 306), (166, 306))
    d.box(170, 276, 130, 56)
    d.text(235, 311, "f(z, x)", 18, "middle")
    d.arrow((300, 306), (426, 306))
    d.text(434, 312, "z* = f(z*, x)", 18)
    d.arrow((356, 306), (356, 256), (112, 256), (112, 292), (166, 292))
    d.text(366, 284, "z, again", 15, "quiet")
    d.box(217, 346, 36, 16, "warm")
    d.text(266, 360, "memory", 14, "quiet")
    return d


ROOMS = (  # from the top: modules, what they hold
    ("cli", "the command deqcore", "box"),
    ("study · monitor · diagnostics · testing · bench", "what uses solves", "box"),
    ("api · implicit · layer · halting", "fixed_point, root, vjp; what layers share", "warm"),
    ("solve.dispatch · solve.plan", "settings and arrays become one Plan", "warm"),
    ("config · plugins", "settings; the registry of names", "box"),
    ("backward", "strategies: g → u = (I − Jᵀ)⁻¹ g", "green"),
    ("solve.loop · solve.termination", "the loop; how a sample stops", "green"),
    ("solvers", "auto, picard, anderson, broyden, newton-krylov", "green"),
    ("linear", "GMRES, low-rank estimates", "green"),
    ("solution", "what the user gets", "box"),
    ("abc", "contracts: Backend, Solver, Strategy, History", "box"),
    ("types · errors", "records and exceptions, ground floor", "box"),
)


def rooms() -> Drawing:
    """Draw the layers of deqcore, from the ground floor up, and the backends beside them."""
    step, top = 50, 52
    d = Drawing(480, top + step * len(ROOMS) + 92, "The layers of deqcore; each imports only from those below it.")
    d.text(18, 34, "deqcore: a layer imports from those below it", 17, "strong")
    for row, (names, what, style) in enumerate(ROOMS):
        y = top + step * row
        d.box(16, y, 448, 44, style)
        d.code(28, y + 19, names, 15)
        d.text(28, y + 37, what, 14, "quiet")
    y = top + step * len(ROOMS) + 10
    d.box(16, y, 448, 66, "warm")
    d.code(28, y + 24, "deqcore_numpy · deqcore_torch · deqcore_jax", 15)
    d.text(28, y + 44, "one package per framework: each implements abc.backend", 14, "quiet")
    d.text(28, y + 60, "and is loaded by name; deqcore imports none of them", 14, "quiet")
    return d


@dataclass(frozen=True)
class Stop:
    """One station of a call: a name in the tree, its file, and what happens there."""

    name: str
    file: str
    what: tuple[str, ...]
    style: str = "box"


FORWARD = (
    Stop("fixed_point", "deqcore/api.py", ("You call fixed_point(f, z0, *args).",)),
    Stop(
        "plan_call",
        "deqcore/solve/dispatch.py",
        ("Settings are resolved; the arrays pick the", "backend; solver and strategy are made."),
    ),
    Stop(
        "solve",
        "deqcore/solve/call.py",
        ("The body of the call: wrap f, run the plan,", "build the Solution, report what failed."),
    ),
    Stop(
        "RavelSpec",
        "deqcore/solve/flatten.py",
        ("The tree z0 becomes one (batch, n) array,", "and f a FlatFunction of such arrays."),
    ),
    Stop("Plan", "deqcore/solve/plan.py", ("Plan.run gives f, a BoundSolve and an", "Adjoint to Autodiff.implicit.")),
    Stop(
        "iterate",
        "deqcore/solve/loop.py",
        ("Until all samples have stopped: take_step", "(step.py), residual, termination, select."),
        "green",
    ),
    Stop(
        "implicit",
        "backends/…",
        ("f is evaluated at z* once more and recorded;", "the value is z* with that derivative."),
        "warm",
    ),
    Stop("Solution", "deqcore/solution.py", ("sol.value, residual, status, steps.",)),
)
BACKWARD = (
    Stop("implicit", "backends/…", ("The framework's autograd arrives with the", "cotangent g = ∂L/∂z*."), "warm"),
    Stop(
        "Adjoint",
        "deqcore/solve/adjoint.py",
        ("Scales g per sample; gets the solver's", "estimate of (I − J)⁻¹ if it is wanted."),
    ),
    Stop(
        "solve_adjoint",
        "deqcore/backward/…",
        ("The strategy finds u = (I − Jᵀ)⁻¹ g. Each", "vjp Jᵀu goes through the recorded f."),
        "green",
    ),
    Stop(
        "Watch",
        "deqcore/solve/failures.py",
        ("At times measures the adjoint residual and", "looks for coupled rows; warns or raises."),
    ),
    Stop("AdjointReport", "deqcore/types/", ("Per sample: status, vjps, residual, error;", "kept as sol.backward.")),
    Stop(
        "implicit",
        "backends/…",
        ("u goes once through the recorded f: the", "gradients of parameters and arguments."),
        "warm",
    ),
)


def way(title: str, stops: tuple[Stop, ...]) -> Drawing:
    """Draw a column of stations."""
    heights = [50 + 19 * len(stop.what) for stop in stops]
    gap = 22
    d = Drawing(400, 60 + sum(heights) + gap * (len(stops) - 1) + 16, title)
    d.text(20, 36, title, 18, "strong")
    y = 56
    for number, (stop, height) in enumerate(zip(stops, heights, strict=True)):
        d.box(20, y, 360, height, stop.style)
        d.code(34, y + 22, stop.name, 15)
        d.text(34, y + 39, stop.file, 13, "code quiet")
        for line, words in enumerate(stop.what):
            d.text(34, y + 58 + 19 * line, words, 15)
        if number + 1 < len(stops):
            d.arrow((200, y + height), (200, y + height + gap - 2))
        y += height + gap
    return d


def badge(left: str, right: str) -> str:
    """Write a flat badge that needs no network."""
    a, b = 12 + 6.6 * len(left), 12 + 6.6 * len(right)
    text = 'font-family="Verdana, DejaVu Sans, sans-serif" font-size="11" fill="#fff" text-anchor="middle"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{a + b:.0f}" height="20" role="img" '
        f'aria-label="{left}: {right}">\n'
        f'<rect width="{a + b:.0f}" height="20" rx="3" fill="#3949ab"/>\n'
        f'<path d="M3 0h{a - 3:.0f}v20h-{a - 3:.0f}a3 3 0 0 1 -3 -3v-14a3 3 0 0 1 3 -3z" fill="#4a4f5a"/>\n'
        f'<text x="{a / 2:.0f}" y="14" {text}>{left}</text>\n'
        f'<text x="{a + b / 2:.0f}" y="14" {text}>{right}</text>\n</svg>\n'
    )


def drawings() -> dict[str, str]:
    """Return the text of each file, by its name without `.svg`."""
    return {
        "equilibrium": equilibrium().svg(),
        "rooms": rooms().svg(),
        "call-forward": way("A call: the way of f", FORWARD).svg(),
        "call-backward": way("Its gradient: the way of g", BACKWARD).svg(),
        "badge-licence": badge("licence", "Apache-2.0"),
        "badge-python": badge("python", "3.11 – 3.14"),
        "badge-status": badge("status", "alpha"),
    }


if __name__ == "__main__":
    for name, text in drawings().items():
        (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")
