"""Memory, control flow and the checks of the emulator: bounds, races, barriers, uninitialised memory, and what errors say."""

from __future__ import annotations

import numpy as np
import pytest
from emulator.errors import BadBarrier, EmulatorError, OutOfBounds, Race, Unsupported
from emulator.machine import Call
from emulator_kernels import LANES, Kernels, signed

pytestmark = pytest.mark.emulated

M32 = 0xFFFFFFFF
LANE = range(LANES)
RNG = np.random.default_rng(2)
BITS = [RNG.integers(0, 1 << 32, LANES, dtype=np.uint32) for _ in range(4)]

STORE8 = "v_lshlrev_b32 v30, 4, v0\nds_store_b128 v30, v[10:13]\n"
ROW_BYTES = 4 * LANES
MEMORY = {
    STORE8 + "ds_load_b64 v[20:21], v30 offset:8": lambda b, k: (b[2][k], b[3][k]),
    STORE8 + "ds_load_2addr_b32 v[20:21], v30 offset0:3 offset1:1": lambda b, k: (b[3][k], b[1][k]),
    STORE8 + "ds_load_b96 v[20:22], v30 offset:4": lambda b, k: (b[1][k], b[2][k], b[3][k]),
    STORE8 + "ds_load_u16 v20, v30 offset:6\nds_load_i8 v21, v30 offset:1": lambda b, k: (b[1][k] >> 16, signed(b[0][k] >> 8, 8)),
    STORE8 + "ds_load_u16_d16 v20, v30\nds_load_u16_d16_hi v20, v30 offset:14": lambda b, k: (b[0][k] & 0xFFFF | b[3][k] >> 16 << 16,),
    STORE8 + "ds_store_b16_d16_hi v30, v11\nds_store_b8 v30, v12 offset:3\nds_load_b32 v20, v30": (
        lambda b, k: (b[1][k] >> 16 | b[0][k] & 0xFF0000 | (b[2][k] & 0xFF) << 24,)
    ),
    STORE8 + "ds_store_2addr_stride64_b32 v30, v12, v13 offset0:1 offset1:2\nds_load_b32 v20, v30 offset:512": lambda b, k: (b[3][k],),
    STORE8 + "ds_load_b64 v[20:21], v30 offset:2": lambda b, k: (
        b[0][k] >> 16 | (b[1][k] & 0xFFFF) << 16,
        b[1][k] >> 16 | (b[2][k] & 0xFFFF) << 16,
    ),
    STORE8 + "v_add_nc_u32 v30, -32, v30\nds_load_b32 v20, v30 offset:36": lambda b, k: (b[1][k],),
    "v_mov_b32 v31, 0\nds_store_b32 v31, v31\nds_add_u32 v31, v0\nds_load_b32 v20, v31": lambda b, k: (sum(LANE),),
    "v_mov_b32 v31, 0\nds_store_b32 v31, v31\nds_add_rtn_u32 v20, v31, v0": lambda b, k: (sum(range(k)),),
    "scratch_store_b64 off, v[10:11], off offset:8\nscratch_load_b32 v20, off, off offset:12": lambda b, k: (b[1][k],),
    "v_lshlrev_b32 v30, 2, v0\nv_and_b32 v30, 31, v30\nscratch_store_b32 v30, v10, off\nscratch_load_u16 v20, v30, off offset:2": (
        lambda b, k: (b[0][k] >> 16,)
    ),
    "s_mov_b64 s[10:11], src_private_base\nv_mov_b32 v30, 16\nv_mov_b32 v31, s11\nflat_store_b32 v[30:31], v10\n"
    "scratch_load_b32 v20, off, off offset:16": lambda b, k: (b[0][k],),
    "s_mov_b64 s[10:11], src_shared_base\nv_mov_b32 v30, v1\nv_mov_b32 v31, s11\nflat_store_b32 v[30:31], v10\nds_load_b32 v20, v1\n"
    "flat_load_b32 v21, v[30:31]": lambda b, k: (b[0][k], b[0][k]),
    "v_mov_b32 v30, s4\nv_mov_b32 v31, s5\nv_add_co_u32 v30, vcc_lo, v30, v1\nv_add_co_ci_u32 v31, vcc_lo, 0, v31, vcc_lo\n"
    f"global_load_u16 v20, v[30:31], off offset:2\nflat_load_b32 v21, v[30:31] offset:{ROW_BYTES}": lambda b, k: (b[0][k] >> 16, b[1][k]),
    "global_load_d16_hi_b16 v20, v1, s[4:5]\nglobal_load_i8 v21, v1, s[4:5] offset:3": (
        lambda b, k: ((b[0][k] & 0xFFFF) << 16, signed(b[0][k] >> 24, 8))
    ),
    "v_lshlrev_b32 v30, 3, v0\nglobal_load_b64 v[20:21], v30, s[4:5] offset:2": lambda b, k: tuple(
        int.from_bytes(b"".join(int(x).to_bytes(4, "little") for r in b for x in r)[8 * k + 2 + s :][:4], "little") for s in (0, 4)
    ),
    "s_load_b64 s[10:11], s[4:5], 0x4\ns_waitcnt lgkmcnt(0)\nv_mov_b32 v20, s10\nv_mov_b32 v21, s11": lambda b, k: (b[0][1], b[0][2]),
    "s_cmp_lg_u32 s8, 0\ns_cbranch_scc1 9f\nv_mov_b32 v20, 1\n9:": lambda b, k: (1,),
    "v_cmp_eq_u32 vcc_lo, 3, v0\ns_and_saveexec_b32 s10, vcc_lo\ns_cbranch_execz 9f\nv_mov_b32 v20, 1\n9:\ns_mov_b32 exec_lo, s10": (
        lambda b, k: (int(k == 3),)
    ),
    # a loop with as many rounds as the lane's number, in structured form
    "v_mov_b32 v30, v0\ns_mov_b32 s10, 0\n8:\nv_cmp_gt_u32 vcc_lo, 1, v30\ns_or_b32 s10, vcc_lo, s10\n"
    "s_and_not1_b32 exec_lo, exec_lo, s10\ns_cbranch_execz 9f\n"
    "v_add_nc_u32 v20, v20, v30\nv_add_nc_u32 v30, -1, v30\ns_branch 8b\n9:\ns_mov_b32 exec_lo, -1": (lambda b, k: (k * (k + 1) // 2,)),
}


MEMORY_KERNELS = Kernels("memory", MEMORY)


@pytest.mark.parametrize("body", MEMORY)
def test_memory_and_control(body: str) -> None:
    got = MEMORY_KERNELS.run(body, *BITS)
    numbers = [[int(x) for x in row] for row in BITS]
    for k in LANE:
        for column, want in zip(got[:, k], MEMORY[body](numbers, k), strict=False):
            assert int(column) == want & M32, k


WRONG = {
    "global_load_b32 v20, v1, s[4:5] offset:8*128-60": (
        OutOfBounds,
        "load of 4 bytes at byte 1024 of an allocation of 1024 bytes (17 of 32 lanes)",
    ),
    "global_store_b32 v1, v20, s[6:7] offset:4*128-60": (OutOfBounds, "store of 4 bytes"),
    "v_mov_b32 v30, 0\nv_mov_b32 v31, 0\nglobal_load_b32 v20, v[30:31], off": (OutOfBounds, "before all allocations"),
    "ds_load_b32 v20, v1 offset:4096-60": (OutOfBounds, "LDS access of 4 bytes at 4096"),
    "scratch_load_b64 v[20:21], off, off offset:60": (OutOfBounds, "scratch access"),
    "v_cubeid_f32 v20, v10, v11, v12": (Unsupported, "V_CUBEID_F32"),
    "s_sendmsg_rtn_b32 s10, sendmsg(MSG_RTN_GET_REALTIME)": (Unsupported, "S_SENDMSG_RTN_B32"),
}


WRONG_KERNELS = Kernels("wrong", WRONG)


@pytest.mark.parametrize("body", WRONG)
def test_errors_say_what_and_where(body: str) -> None:
    kind, message = WRONG[body]
    with pytest.raises(kind) as caught:
        WRONG_KERNELS.run(body, *BITS)
    assert message in str(caught.value)
    assert " at 0x" in str(caught.value), "the kernel and the place"


POISON = "ds_load_b32 v20, v1\nscratch_load_b32 v21, off, off\nv_mov_b32 v22, v50"
ENDLESS = "8:\nv_add_nc_u32 v20, 1, v20\ns_branch 8b"
POISON_KERNELS = Kernels("poison", [POISON, ENDLESS])


def test_uninitialised_memory_is_not_a_number() -> None:
    got = POISON_KERNELS.run(POISON, *BITS)
    assert np.isnan(got[:2].view(np.float32)).all()
    assert np.isnan(got[2].view(np.float16)).all()


# two waves: s9 is the number of the wave, v30 the address of the other wave's lane
TWO = "v_readfirstlane_b32 s9, v0\ns_lshr_b32 s9, s9, 5\nv_xor_b32 v30, 128, v1\n"
WIDE = "v_lshlrev_b32 v32, 4, v0\nv_xor_b32 v33, 512, v32\n"  # 16 bytes for each lane: this one's, and that of the other wave's lane
RACES = {
    "read before the barrier": (TWO + "ds_store_b32 v1, v10\nds_load_b32 v20, v30", True),
    "read after the barrier": (TWO + "ds_store_b32 v1, v10\ns_barrier\nds_load_b32 v20, v30", False),
    "own value": (TWO + "ds_store_b32 v1, v10\nds_load_b32 v20, v1", False),
    "write after another's read": (TWO + "ds_store_b32 v1, v10\ns_barrier\nds_load_b32 v20, v30\nds_store_b32 v1, v11", True),
    "write after barrier after read": (
        TWO + "ds_store_b32 v1, v10\ns_barrier\nds_load_b32 v20, v30\ns_barrier\nds_store_b32 v1, v11",
        False,
    ),
    "both write": (TWO + "v_and_b32 v31, 127, v1\nds_store_b32 v31, v10", True),
    "both read": (TWO + "v_and_b32 v31, 127, v1\nds_load_b32 v20, v31\nds_load_b32 v20, v31", False),
    "halves of one dword": (TWO + "s_lshl_b32 s9, s9, 1\nv_and_b32 v31, 127, v1\nv_add_nc_u32 v31, s9, v31\nds_store_b16 v31, v10", False),
    "wide read before the barrier": (TWO + WIDE + "ds_store_b128 v32, v[10:13]\nds_load_b64 v[20:21], v33 offset:8", True),
    "wide write after another's read": (
        TWO + WIDE + "ds_store_b128 v32, v[10:13]\ns_barrier\nds_load_b128 v[20:23], v33\nds_store_b16 v32, v10 offset:14",
        True,
    ),
    "wide write beside another's read": (
        TWO + WIDE + "ds_store_b64 v32, v[10:11]\nds_store_b64 v33, v[10:11] offset:8\ns_barrier\n"
        "ds_load_b64 v[20:21], v33\nds_store_b64 v32, v[10:11] offset:8",
        False,
    ),
    "lanes that are off": (
        TWO + "ds_store_b32 v1, v10\nv_cmpx_gt_u32 32, v0\nds_load_b32 v20, v1\ns_mov_b32 exec_lo, -1",
        False,
    ),
    "after thousands of barriers": (
        TWO + "s_movk_i32 s10, 2100\nds_store_b32 v1, v10\n9:\ns_barrier\nds_load_b32 v20, v1\ns_addk_i32 s10, -1\ns_cmp_lg_u32 s10, 0\n"
        "s_cbranch_scc1 9b\nds_store_b32 v30, v10",
        True,
    ),
    "thousands of barriers": (
        TWO + "s_movk_i32 s10, 2100\n9:\ns_barrier\nds_store_b32 v1, v10\ns_barrier\nds_load_b32 v20, v30\ns_addk_i32 s10, -1\n"
        "s_cmp_lg_u32 s10, 0\ns_cbranch_scc1 9b",
        False,
    ),
    "one wave leaves": (
        TWO + "s_cmp_eq_u32 s9, 0\ns_cbranch_scc1 9f\nds_store_b32 v1, v10\n9:\ns_barrier\nds_load_b32 v20, v1 offset:128",
        False,
    ),
}
BARRIERS = TWO + "s_cmp_eq_u32 s9, 0\ns_cbranch_scc1 9f\ns_barrier\ns_branch 8f\n9:\ns_barrier\n8:\ns_nop 0"


BLOCK_NUMBER = TWO + "v_mov_b32 v21, s8\ns_cmp_lt_u32 s8, 7\ns_cbranch_scc1 9f\nv_mov_b32 v22, 1\n9:\ns_barrier"
TWO_KERNELS = Kernels("two", [*(body for body, _ in RACES.values()), BARRIERS, BLOCK_NUMBER], waves=2)


@pytest.mark.parametrize("case", RACES)
def test_races(case: str) -> None:
    body, races = RACES[case]
    machine, name = TWO_KERNELS.bench(), TWO_KERNELS.names[body]
    rows = [np.resize(x, 2 * LANES) for x in BITS]
    if races:
        with pytest.raises(Race, match="since the last barrier"):
            machine.run(name, rows)
    else:
        machine.run(name, rows)


def test_different_barriers() -> None:
    machine, name = TWO_KERNELS.bench(), TWO_KERNELS.names[BARRIERS]
    with pytest.raises(BadBarrier, match="different barriers"):
        machine.run(name, BITS)


def test_values_cross_at_a_barrier() -> None:
    machine, name = TWO_KERNELS.bench(), TWO_KERNELS.names[RACES["read after the barrier"][0]]
    rows = RNG.integers(0, 1 << 32, 2 * LANES, dtype=np.uint32)
    assert machine.run(name, [rows])[0].tolist() == np.roll(rows, LANES).tolist()


def test_many_blocks_run_at_once() -> None:
    machine, name = TWO_KERNELS.bench(), TWO_KERNELS.names[BLOCK_NUMBER]
    before = machine.memory.ends[-1]
    machine.run(name, [BITS[0]], grid=(300, 1, 1))
    assert before < machine.memory.ends[-1]


def test_wrong_argument_size() -> None:
    machine, name = POISON_KERNELS.bench(), POISON_KERNELS.names[POISON]
    with pytest.raises(ValueError, match="bytes for 8"):
        machine.machine.launch(machine.code, Call(name, (1, 1, 1), (32, 1, 1), [b"1234", b"12345678"]))


def test_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emulator.machine.WAVE_INSTRUCTIONS", 10_000)
    with pytest.raises(EmulatorError, match="does not end"):
        POISON_KERNELS.run(ENDLESS)
