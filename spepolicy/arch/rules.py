"""The numbered rules of spe.md section 2: which of them the project implements, and why it leaves out the others.

`RULES` has what is implemented, with the tests named after it (`test_rule_N_...`); `OUT_OF_SCOPE` has the rest. A test
holds that every rule of the sheet is in exactly one of them and that every rule of `RULES` has its test.
"""

from __future__ import annotations

__all__ = ["LAST_RULE", "OUT_OF_SCOPE", "RULES"]

LAST_RULE = 51  # the sheet numbers its rules from 1

RULES: dict[int, str] = {
    1: "owning Security state and exception level",
    2: "when profiling is stopped",
    3: "when the buffer is enabled",
    4: "when profiling is enabled at an exception level",
    5: "no profiling of a VHE host into a guest's buffer",
    6: "a host that owns the buffer samples its guest",
    7: "what is collected while the buffer is disabled or stopped is discarded",
    8: "the population, and what of it is picked",
    9: "PMSICR_EL1 when profiling becomes enabled",
    10: "period without jitter",
    11: "jitter without FEAT_SPE_ERnd",
    12: "jitter with FEAT_SPE_ERnd",
    13: "the counter holds while profiling is disabled",
    14: "collisions",
    15: "what is captured when a sample starts",
    16: "which operations have a data address",
    17: "what a record has",
    19: "filters are ANDed",
    20: "type filter, with and without FEAT_SPE_EFT",
    21: "filters whose effect is CONSTRAINED UNPREDICTABLE",
    22: "PMU events",
    23: "discard mode",
    24: "context packets",
    25: "timestamp source",
    26: "physical address packets",
    27: "size and alignment of a record",
    28: "latency counters saturate",
    29: "bytes are written one after the other, never from LIMIT on",
    30: "the access of a buffer write is privileged and ignores PAN",
    31: "buffer writes go through stage 1 and stage 2; a cut record is not continued",
    32: "TLB maintenance",
    33: "hardware management of the access flag",
    34: "pointer rules",
    35: "records that cross pages, and Device memory",
    36: "priority of events",
    37: "buffer full",
    38: "MMU faults",
    39: "how far PTR is behind the last record",
    40: "samples lost at a fault",
    41: "access not allowed",
    42: "external aborts, by version",
    43: "events while stopped",
    44: "which exception level is told",
    45: "restart",
    46: "PMBIRQ",
    47: "profiling exceptions take the place of PMBIRQ",
    48: "PSB CSYNC and DSB",
    49: "the drain",
    50: "FEAT_SPE_nVM: pointers are physical, stage 1 is off for the SPU only",
    51: "with FEAT_SPE_nVM a host pins [PTR, LIMIT) without a walk",
}

OUT_OF_SCOPE: dict[int, str] = {
    18: "registers redirected to memory by FEAT_NV2: the guests modelled run no hypervisor of their own",
}
"""Rule -> reason."""
