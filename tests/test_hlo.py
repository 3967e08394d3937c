"""What is counted in compiled programs, against counts by hand."""

import json

import accelerators
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import targets
from jax.sharding import NamedSharding, PartitionSpec as P

# Two products of cuBLAS, of which one is in a branch; a fusion that cuts a slice; a loop.
GEMM = (
    'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
    '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
)
GPU = """HloModule jit_f, entry_computation_layout={(bf16[8,16]{1,0})->f32[8,4]{1,0}}

%fused_slice (param_0: bf16[8,16], param_1: s32[]) -> bf16[8,4] {
  %param_0 = bf16[8,16]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = bf16[8,4]{1,0} dynamic-slice(%param_0, %zero, %param_1), dynamic_slice_sizes={8,4}
}

%kept (arg: (bf16[8,16], bf16[16,4])) -> (f32[8,4]) {
  %arg = (bf16[8,16]{1,0}, bf16[16,4]{1,0}) parameter(0)
  %lhs = bf16[8,16]{1,0} get-tuple-element(%arg), index=0
  %rhs = bf16[16,4]{1,0} get-tuple-element(%arg), index=1
  %gemm.2 = (f32[8,4]{1,0}, s8[4096]{0}) custom-call(%lhs, %rhs), GEMM
  %product = f32[8,4]{1,0} get-tuple-element(%gemm.2), index=0
  ROOT %result = (f32[8,4]{1,0}) tuple(%product)
}

%dropped (arg.1: (bf16[8,16], bf16[16,4])) -> (f32[8,4]) {
  %arg.1 = (bf16[8,16]{1,0}, bf16[16,4]{1,0}) parameter(0)
  %none = f32[8,4]{1,0} broadcast(%c), dimensions={}
  ROOT %result.1 = (f32[8,4]{1,0}) tuple(%none)
}

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%carry), index=1
  %i = s32[] get-tuple-element(%carry), index=0
  %doubled = f32[8]{0} copy(%x)
  ROOT %next = (s32[], f32[8]{0}) tuple(%i, %doubled)
}

ENTRY %main (a: bf16[8,16], b: bf16[16,4], p: pred[], i: s32[]) -> f32[8,4] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  %p = pred[] parameter(2)
  %i.1 = s32[] parameter(3)
  %gemm.1 = (f32[8,4]{1,0}, s8[4096]{0}) custom-call(%a, %b), GEMM
  %slice = bf16[8,4]{1,0} fusion(%a, %i.1), kind=kLoop, calls=%fused_slice
  %both = (bf16[8,16]{1,0}, bf16[16,4]{1,0}) tuple(%a, %b)
  %choice = (f32[8,4]{1,0}) conditional(%p, %both, %both), BRANCHES
  %loop = (s32[], f32[8]{0}) while(%start), body=%body, TIMES
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%choice), index=0
}
"""
for name, text in {
    "GEMM": GEMM,
    "BRANCHES": "true_computation=%kept, false_computation=%dropped",
    "TIMES": 'backend_config={"known_trip_count":{"n":"5"}}',
}.items():
    GPU = GPU.replace(name, text)


def test_a_program_for_gpus():
    program = hlo.parse(GPU)
    found = hlo.kernels(program)
    gemm = 2 * 8 * 4 * 16
    assert [(x.opcode, x.flops, x.runs, x.is_conditional) for x in found] == [
        ("custom-call", gemm, 1.0, False),
        ("fusion", 0, 1.0, False),
        ("custom-call", gemm, 0.5, True),
        ("broadcast", 0, 0.5, True),
        ("copy", 0, 5.0, False),
    ]
    # Both operands, the result and the workspace; the slice, its index and the result; ...
    inputs = 2 * (8 * 16 + 16 * 4)
    assert found[0].bytes == inputs + 4 * 8 * 4 + 4096
    assert found[1].bytes == 2 * 8 * 4 + 4 + 2 * 8 * 4
    assert found[4].bytes == 2 * 4 * 8
    assert hlo.count(program, "while") == hlo.count(program, "conditional") == 1


def compiled_for_cpu(f, *shapes):
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes)).compile()


def test_products_and_convolutions_of_a_program_for_cpus():
    def f(x, w, images, kernel):
        convolved = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x @ w, convolved

    compiled = compiled_for_cpu(f, (32, 64), (64, 48), (2, 12, 12, 8), (3, 3, 8, 16))
    flops = sum(x.flops for x in hlo.kernels(hlo.parse(compiled.as_text())))
    assert flops == 2 * 32 * 64 * 48 + 2 * (2 * 10 * 10 * 16) * (3 * 3 * 8)
    assert flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.01)


def test_a_branch_counts_half():
    def f(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

    (product,) = [
        x
        for x in hlo.kernels(hlo.parse(compiled_for_cpu(f, (64, 64), (64, 64)).as_text()))
        if x.flops
    ]
    assert product.is_conditional and product.runs == 0.5


def test_what_is_sent():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    jitted = jax.jit(lambda x, w: x.T @ w, in_shardings=(split, split), out_shardings=whole)
    shapes = [jax.ShapeDtypeStruct((64, n), jnp.float32) for n in (16, 24)]
    found = hlo.kernels(hlo.parse(jitted.lower(*shapes).compile().as_text()))
    assert sum(x.sent for x in found) == 4 * 16 * 24


def test_the_bound_of_a_step():
    chip = targets.Chip("a chip", flops=100.0, bandwidth=10.0, launch=1.0)
    found = [
        hlo.Kernel("dot", 500.0, 8.0, 0, 2.0, False),  # 10 s at half the peak, 1 s of memory.
        hlo.Kernel("fusion", 0.0, 32.0, 0, 1.0, False),  # 4 s at 80 % of the bandwidth.
        hlo.Kernel("fusion", 0.0, 1.0, 0, 0.5, True),  # A launch, every second step.
    ]
    result = accelerators.roofline(found, chip)
    assert result["bound"] == "products"
    np.testing.assert_allclose(
        list(result["spent"].values()) + [result["seconds"]], [20.0, 4.0, 0.5, 24.5]
    )


def test_the_tables_of_the_page_are_those_of_the_results():
    page = accelerators.PAGE.read_text()
    rows = json.loads(accelerators.RESULTS.read_text())["rows"]
    assert accelerators.with_tables(page, rows) == page
    assert page.count("<!-- -->") == 11
    assert accelerators.with_tables(page, []).count("|") < page.count("|") - 200


def test_a_table_leaves_out_models_with_one_step():
    def row(model, variant, seconds):
        return {"target": "h100:1", "model": model, "variant": variant, "seconds": seconds}

    a, b = list(accelerators.MODELS)[:2]
    rows = [row(a, "full", 2e-3), row(a, "window", 1.5e-3), row(b, "full", 1.0)]
    table = accelerators.matrix(rows, "h100:1", "seconds").splitlines()
    assert table[0] == f"| step | {a} |"
    assert table[2:] == ["| full | 2.00 ms |", "| window | 0.75 |"]
