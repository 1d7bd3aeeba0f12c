"""The grid that every implementation is run on. Names say what is special; all else is small and plain."""

from __future__ import annotations

from tests.attention.problem import Case

CAUSAL = {"is_causal": True}
BOTTOM_RIGHT = {"is_causal": True, "causal_alignment": "bottom_right"}
TOP_LEFT = {"is_causal": True, "causal_alignment": "top_left"}
LSE = {"return_lse": True}

LENGTHS = [
    Case("plain", core=True),
    Case("no-bias", rank=0),
    Case("lengths-1x1", n=1, m=1, options=LSE),
    Case("lengths-1x113", n=1, m=113, batch=(1,), options=LSE),
    Case("lengths-113x1", n=113, m=1),
    Case("lengths-63x113", n=63, m=113, batch=(1,), heads=1, options=LSE),
    Case("lengths-113x63", n=113, m=63, batch=(1,), heads=1),
    Case("lengths-17x1023", n=17, m=1023, batch=(1,), heads=1, fixed=True, slow=True),
    Case("lengths-1023x17", n=1023, m=17, batch=(1,), heads=1, fixed=True, slow=True),
    Case("decode-1x1023", n=1, m=1023, batch=(1,), heads=1, rank=2, slow=True, options=LSE),
    Case("decode-1x333", n=1, m=333, batch=(1,), heads=1, rank=2, options=LSE),
    Case("decode-4x333-causal", n=4, m=333, batch=(1,), heads=1, options=BOTTOM_RIGHT),
    Case("no-batch-dimension", batch=(), phi_q=(2,), phi_k=(2,)),
]

WIDTHS = [
    Case("head-dim-8", head_dim=8),
    Case("head-dim-24", head_dim=24, core=True),
    Case("head-dim-40-v-24", head_dim=40, head_dim_v=24),
    Case("head-dim-80", head_dim=80, rank=16),
    Case("head-dim-96-v-128", head_dim=96, head_dim_v=128),
    Case("head-dim-256", head_dim=256, batch=(1,), heads=1),
    Case("head-dim-11-v-5", head_dim=11, head_dim_v=5),
    Case("rank-1", rank=1),
    Case("rank-2", rank=2, same_dtype=True),
    Case("rank-7", rank=7, same_dtype=True, core=True),
    Case("rank-7-float32", rank=7),
    Case("rank-16", rank=16, head_dim=32, same_dtype=True),
    Case("rank-33", rank=33, core=True),
    Case("rank-33-same", rank=33, same_dtype=True),
    Case("rank-96", rank=96, head_dim=32, same_dtype=True),
    Case("rank-96-float32", rank=96, batch=(1,), head_dim=32),
    Case("rank-200", rank=200, batch=(1,), heads=1, same_dtype=True),
    Case("rank-200-float32", rank=200, batch=(1,), heads=1),
    Case("ranks-per-head", rank=33, heads=3, batch=(1,), ranks=(33, 1, 8)),
    Case("ranks-per-head-same", rank=7, heads=3, batch=(1,), ranks=(0, 7, 3), same_dtype=True),
    Case(
        "ranks-per-head-centred",
        n=5,
        m=150,
        rank=7,
        heads=3,
        batch=(1,),
        ranks=(0, 7, 3),
        table=9,
        fixed=True,
        core=True,
    ),
    Case("ranks-per-head-wide", rank=200, n=19, heads=2, batch=(1,), ranks=(200, 5), same_dtype=True),
]

BROADCASTS = [
    Case("factors-1-H", n=19, phi_q=(1, 2), phi_k=(1, 2), batch=(3,)),
    Case("factors-B-1", n=19, phi_q=(3, 1), phi_k=(3, 1), batch=(3,)),
    Case("factors-1-1", n=19, phi_q=(1, 1), phi_k=(1, 1), batch=(3,)),
    Case("factors-B-H", n=19, phi_q=(3, 2), phi_k=(3, 2), batch=(3,)),
    Case("factors-H", n=19, phi_q=(2,), phi_k=(2,), batch=(3,)),
    Case("factors-1-H-B-1", n=19, phi_q=(1, 2), phi_k=(3, 1), batch=(3,), core=True),
    Case("factors-1-1-B-H", n=19, phi_q=(1, 1), phi_k=(3, 2), batch=(3,), rank=33),
    Case("windows", batch=(2, 3), n=16, phi_q=(1, 3, 2), phi_k=(1, 3, 2), fixed=True, core=True),
    Case("windows-49", batch=(2, 2), heads=1, n=49, phi_q=(1, 2, 1), phi_k=(1, 2, 1), rank=16, fixed=True),
    Case("windows-long", batch=(2, 1), heads=1, n=65, head_dim=8, phi_q=(1, 1, 1), phi_k=(1, 1, 1), fixed=True),
    Case("windows-mixed", batch=(2, 3), n=16, phi_q=(1, 3, 2), phi_k=(2, 1, 2), fixed=True),
    Case("triangle", batch=(2, 3), n=17, phi_q=(2, 1, 2), phi_k=(2, 1, 2), rank=16, same_dtype=True, core=True),
    Case("four-levels", batch=(2, 2, 2), n=9, phi_q=(2, 1, 2, 1), phi_k=(1, 2, 1, 2)),
    Case("five-levels", batch=(2, 2, 2, 2), n=9, head_dim=8, phi_q=(2, 1, 2, 1, 2), phi_k=(1, 2, 1, 2, 1)),
]

TABLES = [
    Case("table", table=17, rank=0),
    Case("table-one-head", table=9, table_heads=1, rank=0, batch=(1,)),
    Case("table-1-entry", table=1, rank=0, batch=(1,)),
    Case("table-toeplitz", table="toeplitz", rank=0, n=33, m=49, batch=(1,)),
    Case("table-window-codes", table=81, codes="window", rank=0, n=25, fixed=True),
    Case("table-window-codes-and-factors", table=81, codes="window", n=25, fixed=True, mask="matrix"),
    Case("table-and-factors", table=17, n=19, phi_q=(1, 1), phi_k=(1, 2), core=True, options=LSE),
    Case("table-causal", table=17, rank=2, options=CAUSAL),
    Case("table-far-tails", table=5, rank=0, n=65, batch=(1,), heads=1, options={"window": (40, 20)}),
]

MASKS = [
    Case("mask-padding", mask="padding", batch=(3,)),
    Case("mask-matrix", mask="matrix", m=49),
    Case("mask-full", mask="full", m=49, core=True),
    Case("mask-windows", mask="full", batch=(2, 2), n=16, phi_q=(1, 2, 1), phi_k=(1, 2, 1), fixed=True),
    Case("mask-dead-rows", mask="dead rows", options=LSE),
    Case("mask-causal", mask="padding", options=CAUSAL | LSE),
    Case("causal", options=CAUSAL),
    Case("causal-top-left-wide", m=49, options=TOP_LEFT),
    Case("causal-top-left-tall", n=49, m=33, options=TOP_LEFT),
    Case("causal-bottom-right-wide", m=49, options=BOTTOM_RIGHT, core=True),
    Case("causal-bottom-right-tall", n=49, m=33, options=BOTTOM_RIGHT | LSE),
    Case("window-both", n=63, batch=(1,), options={"window": (7, 4)}),
    Case("window-left", n=63, batch=(1,), options={"window": (7, None)}),
    Case("window-right", n=33, options={"window": (None, 3)}),
    Case("window-0-0", options={"window": (0, 0)}),
    Case("window-endless-left", n=100, batch=(1,), options={"window": (2**31 - 1, 3)}),
    Case("window-endless-right", n=100, batch=(1,), options={"window": (5, 2**31 - 1)}),
    Case("window-causal", n=63, batch=(1,), options={"window": (9, None), "is_causal": True}),
    Case(
        "window-bottom-right",
        n=33,
        m=63,
        batch=(1,),
        options={"window": (9, 2), "causal_alignment": "bottom_right"},
    ),
]

OPTIONS = [
    Case("gqa", heads=4, kv_heads=2, batch=(1,), phi_q=(4,), phi_k=(1,)),
    Case("gqa-phi-k-per-head", heads=4, kv_heads=2, batch=(1,), phi_q=(4,), phi_k=(4,), core=True),
    Case("gqa-multi-query", n=17, m=23, heads=3, kv_heads=1, phi_q=(2, 1), phi_k=(2, 1), options=BOTTOM_RIGHT),
    Case("gqa-table", n=19, heads=4, kv_heads=2, batch=(1,), table=9),
    Case("strides-transposed", layout="transposed", core=True),
    Case("strides-sliced", layout="sliced", head_dim=13),
    Case("strides-columns", layout="columns"),
    Case("strides-expanded", layout="expanded"),
    Case("scale", options={"scale": 0.3}),
    Case("scale-same-dtype", same_dtype=True, options={"scale": 0.3}),
    Case("scale-power-of-two", same_dtype=True, options={"scale": 0.5}),
    Case("scale-one", same_dtype=True, rank=33, options={"scale": 1.0}),
    Case("large-scores", size=12.0),
    Case("large-bias", bias_size=5e3, core=True),
    Case("large-bias-same-dtype", bias_size=5e3, same_dtype=True),
    Case("large-bias-high-rank", bias_size=5e3, rank=33),
]

CASES = [*LENGTHS, *WIDTHS, *BROADCASTS, *TABLES, *MASKS, *OPTIONS]
assert len({case.name for case in CASES}) == len(CASES)
