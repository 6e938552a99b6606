#!/usr/bin/env bash
# torch 2.12.1: torch.func.jvp through an operator of torch.library.custom_op gives a tangent of zero, and no error.
#
# An operator with a backward rule (register_autograd) and no forward-mode rule is differentiated forwards as if it were a
# constant: d(x^2)/dx at 3 comes out as 0 where it is 6, and in a sum the other terms' tangents hide it. An
# autograd.Function without `jvp` raises in the same place. The library documents no forward-mode rule for custom_op.
#
# Seen: "value 9.0 tangent 0.0 (it is 6.0); in x^2 + x: 1.0 (it is 7.0)". Exit status 0 while that holds, 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.12.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch


@torch.library.custom_op("finding::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_autograd(
    lambda ctx, gradient: 2 * ctx.saved_tensors[0] * gradient,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(context, inputs, output):
        context.save_for_backward(*inputs)

    @staticmethod
    def backward(context, gradient):
        return 2 * context.saved_tensors[0] * gradient


x, one = torch.tensor(3.0), torch.tensor(1.0)
value, tangent = torch.func.jvp(square, (x,), (one,))
hidden = torch.func.jvp(lambda x: square(x) + x, (x,), (one,))[1]
leaf = x.clone().requires_grad_()
backward = torch.autograd.grad(square(leaf), leaf)[0]
try:
    torch.func.jvp(Square.apply, (x,), (one,))
    raised = False
except RuntimeError:
    raised = True
print(f"torch {torch.__version__}: value {value} tangent {tangent} (it is {backward}); in x^2 + x: {hidden} (it is 7.0)")
print(f"an autograd.Function without jvp raises an error: {raised}")
assert (value, tangent, hidden, backward, raised) == (9, 0, 1, 6, True), "the behaviour has changed"
PYTHON
