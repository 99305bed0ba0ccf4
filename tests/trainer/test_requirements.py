"""What the trainer grew from, requirement by requirement, and the tests that show each.

They are looked up by name, so that none is renamed or removed without somebody reading what it was for. Which of them a
run of the tests leaves out, and why, stands among its skipped ones.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SHOWN_BY = {
    "an 8-bit base with LoRA: the base bit-identical after training; norms, logits and LoRA in float32": (
        "trainer/test_base.py: test_the_base_is_bit_identical_after_training_and_norms_logits_and_lora_are_float32",
        "trainer/test_base.py: test_it_trains_from_the_command_to_a_folder_of_four_bytes_a_parameter",
        "trainer/test_base.py: test_a_device_map_places_the_base",
    ),
    "rank, alpha, targets, dropout, task: the size predicted is the size written; seq2seq trains": (
        "trainer/test_size.py: test_the_bytes_predicted_are_the_bytes_written",
        "trainer/test_size.py: test_bloom_7b_at_rank_16_is_the_31_megabytes_it_was",
        "trainer/test_seq2seq.py: test_each_method_trains_saves_and_reloads",
    ),
    "quotes to tags: columns joined, loss after the marker only, 4 x 4 equals 16 x 1, the loss falls": (
        "trainer/test_data.py: test_the_loss_is_on_the_completion_and_eos_and_on_nothing_before",
        "trainer/test_data.py: test_a_list_is_joined_and_text_is_kept",
        "trainer/test_training.py: test_4_batches_of_4_are_1_batch_of_16",
    ),
    "pushed early: killed at any step, at most one interval is lost; no base weights in the artifact": (
        "trainer/test_push.py: test_every_save_becomes_a_draft_and_the_end_a_version",
        "trainer/test_push.py: test_what_a_killed_run_queued_is_pushed_by_the_next",
        "trainer/test_base.py: test_no_weight_of_the_base_is_in_the_artifact",
    ),
    "inference from the adapter alone: served by its name": (
        "test_end_to_end.py: test_train_push_promote_serve_replace",
    ),
    "it loops without an end of sequence: the label is trained, and an ablation shows the loop": (
        "trainer/test_data.py: test_eos_is_trained_though_pad_is_eos",
        "trainer/test_stages.py: test_without_a_label_on_the_end_the_model_does_not_stop",
    ),
    "prefix tuning, P-tuning, prompt tuning and IA3 train, save and reload, and are not served": (
        "trainer/test_methods.py: test_each_method_trains_with_its_own_rate_and_peft_alone_gives_the_same_loss",
        "trainer/test_methods.py: test_registry_and_engine_refuse_it_and_say_what_it_is",
    ),
    "forgetting: adapter off is the base exactly; the loss on general text is in the receipt": (
        "trainer/test_base.py: test_with_the_adapter_off_the_base_answers_exactly",
        "trainer/test_evaluate.py: test_forgetting_is_measured_on_general_text_with_and_without_the_adapter",
    ),
    "chat: messages of several turns, a truncation policy, output cut by tokens": (
        "trainer/test_forms.py: test_each_trained_turn_follows_the_ids_that_the_server_feeds",
        "trainer/test_data.py: test_long_prompts_lose_their_front_and_keep_answer_and_eos",
        "test_served_as_trained.py: test_the_server_feeds_the_ids_that_were_trained_on",
    ),
    "several processes: the loss of 2 is that of 1; DataParallel is refused with the reason": (
        "trainer/test_team.py: test_the_loss_is_that_of_one_process",
        "trainer/test_team.py: test_data_parallel_is_refused_with_the_reason",
    ),
    "DeepSpeed: ZeRO 1 to 3, offload, and its JSON accepted, or each unsupported key named": (
        "trainer/test_sharding.py: test_the_loss_is_that_of_one_process",
        "trainer/test_deepspeed_json.py: test_the_file_of_the_first_systems",
        "trainer/test_deepspeed_json.py: test_what_disagrees_or_is_not_to_be_had_is_refused",
    ),
    "open data first, then instructions: the second stage continues the first, and says so": (
        "trainer/test_stages.py: test_a_second_stage_goes_on_from_the_first_with_other_data",
    ),
    "QLoRA: NF4 with double quantization; peak memory is written down": (
        "trainer/test_base.py: test_every_quantization_trains_and_leaves_its_base_as_it_was",
        "trainer/test_run.py: test_the_receipt_says_what_the_adapter_was_made_of",
    ),
    "Llama-2-7B on 24 GB: every setting is a key, under old names too; packed loss is unpacked loss; off line": (
        "trainer/test_option_names.py: test_the_settings_of_the_seven_billion_run_under_their_old_names",
        "trainer/test_presets.py: test_the_seven_billion_one_has_every_value_of_the_run_it_comes_from",
        "trainer/test_packing.py: test_packed_loss_and_gradients_are_the_unpacked_ones",
        "trainer/test_progress.py: test_nothing_is_reported_unless_asked_for",
    ),
    "merge: merged and unmerged are compared, and the receipt says how near they are": (
        "trainer/test_merge.py: test_a_4_bit_adapter_is_merged_into_what_it_was_trained_on",
        "trainer/test_merge.py: test_the_receipt_says_how_near_the_merged_is",
    ),
    "base against trained, sampled with the same seed, side by side": (
        "trainer/test_evaluate.py: test_the_card_shows_scores_and_samples_and_is_the_same_for_the_same_run",
    ),
    "<usr> and <bot> are turns, and the loss is on <bot> alone": (
        "trainer/test_forms.py: test_usr_and_bot_are_turns_and_the_loss_is_on_bot",
    ),
    "vision and language: refused with the reason": (
        "trainer/test_base.py: test_a_vision_and_language_base_is_refused_with_the_reason",
    ),
    "several adapters at once: gradients of a mixed batch are those of separate passes": (
        "trainer/test_together.py: test_gradients_of_a_mixed_batch_are_those_of_separate_passes",
        "trainer/test_several.py: test_runs_together_give_the_adapters_of_runs_alone",
    ),
}


@pytest.mark.parametrize("requirement", SHOWN_BY)
def test_each_requirement_has_its_tests(requirement):
    for shown_by in SHOWN_BY[requirement]:
        file, name = shown_by.split(": ")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in there, f"{requirement!r} is shown by {name} of {file}, which is not there"


@pytest.mark.parametrize("requirement", SHOWN_BY)
def test_and_they_are_run(request, requirement):
    """Skipped where some are not, so that nobody takes the rest for a proof."""
    left_out = [told for shown_by in SHOWN_BY[requirement] for told in why_left_out(request.session.items, shown_by)]
    if left_out:
        pytest.skip(f"{requirement}: {'; '.join(left_out)}")


def why_left_out(items: list[pytest.Item], shown_by: str) -> list[str]:
    """What a test, or a case of it, is not run for. `items` are those of the run."""
    file, name = shown_by.split(": ")
    found = [item for item in items if item.path == TESTS / file and item.name.partition("[")[0] == name]
    if not found:
        return [f"{name} is not among the tests asked for (scripts/test --all runs it)"]
    skipping = [(item, mark) for item in found for mark in item.iter_markers("skipif") if any(mark.args)]
    return [f"{item.name} is skipped ({mark.kwargs['reason']})" for item, mark in skipping]
