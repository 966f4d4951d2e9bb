"""Which tests hold which of the bugs that other expert-parallel frameworks had, by the number of the bug.

Bugs of tensor and pipeline parallelism (4, 8) and of parameters without optimizer state (34) have no place here: there
is neither, and the optimizer's state is made with the optimizer.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CONTRACT = "distributed/test_layout_contract.py"
BALANCE, DEVICES, VARIATION = (f"unit/moe/test_balance{part}.py" for part in ("", "_devices", "_variation"))
BIAS, RECOMPUTE = "unit/moe/test_balance_bias.py", "unit/moe/test_balance_recompute.py"
CAPACITY, ROOM, OVER_RANKS = (f"unit/moe/test_capacity{part}.py" for part in ("", "_with_room", "_over_ranks"))
EXCHANGE, LAYER = "unit/moe/test_exchange.py", "unit/moe/test_moe_layer.py"
RULES, SCORES = "unit/moe/test_router_rules.py", "unit/moe/test_router_scores.py"
TALLY, MOVES, STARTS = (
    "unit/training/test_tally.py",
    "unit/training/test_move_biases.py",
    "unit/models/test_initialise.py",
)

INDEX: dict[int, list[str]] = {
    1: [f"{CONTRACT}::test_trap_1_expert_router_and_dense_gradients_do_not_depend_on_expert_parallelism"],
    2: [f"{CONTRACT}::test_trap_2_accumulation_with_uneven_valid_tokens"],
    3: [f"{CONTRACT}::test_trap_3_gradient_norm_is_equal_on_every_rank_and_counts_each_expert_once"],
    5: [f"{CONTRACT}::test_trap_5_expert_data_group_of_one_rank_with_accumulation"],
    6: [
        f"{CONTRACT}::test_trap_6_router_learns_from_the_task_alone_in_every_dispatcher",
        f"{LAYER}::test_trap_6_the_router_learns_from_the_task_alone",
    ],
    7: [
        f"{CONTRACT}::test_trap_7_experts_without_tokens_have_zero_gradients_and_decay_as_elsewhere",
        f"{LAYER}::test_trap_7_an_expert_without_tokens_gets_zeros_not_none",
    ],
    9: [
        f"{CONTRACT}::test_trap_9_gradient_of_each_balance_loss_is_that_of_the_textbook",
        f"{BALANCE}::test_trap_9_value_and_gradient_are_those_of_the_textbook",
        f"{DEVICES}::test_trap_9_value_and_gradient_are_those_of_the_textbook",
        f"{VARIATION}::test_trap_9_the_gradient_in_parts_is_autograd_on_the_whole_batch",
    ],
    10: [
        f"{CONTRACT}::test_trap_10_with_equal_counts_on_all_ranks_aux_over_the_step_is_aux_over_the_micro_batch",
        f"{BALANCE}::test_trap_10_with_equal_counts_in_all_parts_the_global_loss_is_the_micro_loss",
    ],
    11: [
        f"{BALANCE}::test_trap_11_balanced_routing_costs_exactly_one",
        f"{BALANCE}::test_trap_11_load_is_counted_before_drops_and_drops_by_cause",
        f"{DEVICES}::test_trap_11_balanced_load_of_devices_costs_exactly_one",
        f"{DEVICES}::test_trap_11_every_token_on_as_many_devices_as_it_may_costs_exactly_one",
        "property/test_router_properties.py::test_trap_11_even_probabilities_cost_exactly_one_at_any_load",
    ],
    12: [
        f"{BALANCE}::test_trap_12_nothing_is_changed_in_place",
        f"{TALLY}::test_trap_12_records_add_up_and_stay_as_they_are",
        "unit/dist/test_peers.py::test_trap_12_ranks_together_hear_the_same_in_the_order_of_ranks",
    ],
    13: [
        f"{BALANCE}::test_trap_13_padding_counts_nowhere",
        f"{RULES}::test_trap_13_padding_has_no_part_in_what_valid_tokens_get",
        f"{CAPACITY}::test_trap_13_padding_has_no_effect_on_capacity",
        f"{TALLY}::test_trap_13_figures_of_a_layer_without_tokens_are_finite",
    ],
    14: [f"{TALLY}::test_trap_14_the_reported_loss_is_the_cross_entropy_alone"],
    15: [
        f"{RECOMPUTE}::test_traps_15_17_28_a_recomputed_layer_has_the_same_record_and_gradients",
        f"{TALLY}::test_trap_15_two_micro_batches_measure_as_one",
    ],
    16: [
        f"{CONTRACT}::test_trap_16_bias_moves_once_per_step_by_the_counts_of_all_ranks_and_micro_batches",
        f"{MOVES}::test_trap_16_one_update_per_step_from_the_summed_counts",
        f"{BIAS}::test_trap_16_the_update_is_from_the_counts_of_all_parts_not_from_each",
    ],
    17: [
        f"{RECOMPUTE}::test_traps_15_17_28_a_recomputed_layer_has_the_same_record_and_gradients",
        f"{RECOMPUTE}::test_trap_17_layers_with_and_without_checkpointing_side_by_side_count_alike",
    ],
    18: [
        f"{BIAS}::test_trap_18_forward_leaves_the_bias_alone",
        f"{MOVES}::test_trap_18_evaluation_leaves_the_biases_alone",
    ],
    19: [
        f"{BIAS}::test_trap_19_the_bias_is_fp32_when_the_model_computes_in_bf16",
        f"{STARTS}::test_trap_19_routers_and_their_biases_are_kept_in_fp32",
        f"{MOVES}::test_trap_19_a_dense_layer_beside_does_not_stop_the_update",
        "distributed/test_trained_checkpoints.py::"
        "test_trap_33_weights_moments_and_biases_saved_at_ep_4_load_at_ep_1_2_and_4",
    ],
    20: [
        f"{CONTRACT}::test_trap_20_bias_decides_who_is_chosen_but_is_in_no_weight",
        f"{SCORES}::test_trap_20_the_bias_changes_selection_only",
    ],
    21: [
        f"{CONTRACT}::test_trap_21_ranks_that_send_nothing_and_ranks_that_receive_nothing",
        f"{EXCHANGE}::test_traps_21_22_29_groups_of_one_two_and_four_ranks",
    ],
    22: [
        f"{CONTRACT}::test_trap_22_all_tokens_to_one_expert_and_as_many_choices_as_experts",
        f"{CONTRACT}::test_trap_22_experts_that_do_not_divide_over_the_ranks_are_refused",
        f"{EXCHANGE}::test_traps_21_22_29_groups_of_one_two_and_four_ranks",
    ],
    23: [
        f"{LAYER}::test_trap_23_experts_without_tokens_read_no_stale_memory",
        "unit/ops/test_expert_ffn.py::test_given_choices",
    ],
    24: [
        f"{LAYER}::test_trap_24_the_gradient_of_a_plain_sum",
        "unit/ops/test_expert_ffn.py::test_a_stride_zero_gradient",
    ],
    25: [
        f"{CAPACITY}::test_trap_25_the_limit_is_rounded_up_at_least_one_and_at_most_the_tokens",
        f"{OVER_RANKS}::test_trap_25_a_capacity_over_ranks_with_unequal_valid_tokens_is_that_of_one_process",
    ],
    26: [f"{CAPACITY}::test_trap_26_drop_by_position_keeps_the_earliest_tokens"],
    27: [f"{CAPACITY}::test_trap_27_the_defaults_are_values_that_the_code_accepts"],
    28: [
        f"{RULES}::test_trap_28_bf16_tokens_are_routed_in_fp32",
        f"{RULES}::test_trap_28_recomputation_decides_the_same",
        f"{RECOMPUTE}::test_traps_15_17_28_a_recomputed_layer_has_the_same_record_and_gradients",
    ],
    29: [
        f"{LAYER}::test_trap_29_identity_experts_make_the_identity_with_any_router_whose_weights_sum_to_one",
        f"{ROOM}::test_trap_29_identity_experts_are_the_identity_without_drops",
        f"{ROOM}::test_trap_29_identity_experts_are_the_identity_when_what_is_refused_finds_room",
        f"{EXCHANGE}::test_traps_21_22_29_groups_of_one_two_and_four_ranks",
    ],
    30: [f"{CAPACITY}::test_trap_30_dropped_tokens_contribute_nothing_and_are_reported"],
    31: [
        f"{STARTS}::test_trap_31_each_global_expert_starts_the_same_at_every_ep_size",
        f"{STARTS}::test_trap_31_no_two_tensors_start_alike",
    ],
    32: ["unit/training/test_optim.py::test_trap_32_every_parameter_is_in_exactly_one_group"],
    33: [
        "distributed/test_trained_checkpoints.py::"
        "test_trap_33_weights_moments_and_biases_saved_at_ep_4_load_at_ep_1_2_and_4"
    ],
    35: ["integration/test_resume.py::test_trap_35_three_stops_leave_no_trace_in_weights_and_moments"],
    36: [
        "distributed/test_interop_layouts.py::test_trap_36_every_layout_reads_what_every_other_wrote",
        "integration/test_pretrained.py::test_an_exported_then_imported_model_goes_on_with_the_same_loss",
    ],
    37: [
        f"{TALLY}::test_trap_37_a_model_without_experts_is_measured_too",
        f"{CONTRACT}::test_trap_37_modules_ahead_are_measured_with_and_without_experts_in_the_layers",
    ],
    38: ["unit/dist/test_group_order.py::test_trap_38_every_rank_makes_the_same_groups_in_the_same_order"],
    39: [f"{STARTS}::test_trap_39_truncated_values_come_from_a_generator_of_their_own"],
    40: [
        f"{LAYER}::test_trap_40_token_choice_does_not_see_the_future",
        f"{LAYER}::test_trap_40_expert_choice_sees_the_future",
    ],
}
CONCERNED = {*range(1, 41)} - {4, 8, 34}
"""Numbers of the bugs that concern this project."""


@cache
def names_in(file: str) -> set[str]:
    """The names of a file's tests, without running it."""
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def numbers_in(name: str) -> set[int]:
    """The numbers that a test's name gives: test_trap_9_... or test_traps_15_17_28_..."""
    words = name.removeprefix("test_").split("_")
    if words[0] not in ("trap", "traps"):
        return set()
    numbers: set[int] = set()
    for word in words[1:]:
        if not word.isdigit() or (words[0] == "trap" and numbers):
            break
        numbers.add(int(word))
    return numbers


def test_every_trap_that_concerns_this_project_is_listed() -> None:
    assert set(INDEX) == CONCERNED


@pytest.mark.parametrize("trap", INDEX)
def test_the_tests_of_a_trap_exist_and_one_is_named_after_it(trap: int) -> None:
    nodes = [node.split("::") for node in INDEX[trap]]
    assert [(file, name) for file, name in nodes if name not in names_in(file)] == []
    assert any(trap in numbers_in(name) for _, name in nodes)


def test_every_test_named_after_a_trap_is_listed() -> None:
    listed = {node for nodes in INDEX.values() for node in nodes}
    files = [path.relative_to(TESTS).as_posix() for path in sorted(TESTS.rglob("test_*.py"))]
    named = {f"{file}::{name}" for file in files for name in names_in(file) if numbers_in(name)}
    assert named - listed == set()
