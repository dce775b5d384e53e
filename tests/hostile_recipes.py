"""Recipes that must be refused before anybody can approve them, as a table of cases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

OPTIONS: dict[str, Any] = {"np": 1, "auto_op_parallelism": False, "skip_op_error": False}


@dataclass(frozen=True)
class Case:
    """A recipe's text and a word of the error that it must end in."""

    name: str
    text: str
    word: str


def written(process: list[Any], **options: Any) -> str:
    """Return a recipe's text."""
    return yaml.safe_dump({**OPTIONS, **options, "process": process}, sort_keys=False)


def plan(process: list[Any], **fields: Any) -> str:
    """Return the text of a data plan whose second branch has these operators."""
    branches = [{"name": "plain", "process": []}, {"name": "odd", "process": process}]
    return yaml.safe_dump({**OPTIONS, "branches": branches, **fields}, sort_keys=False)


def step(operator: str, **parameters: Any) -> dict[str, Any]:
    """Return one operator as a process list holds it."""
    return {operator: parameters}


def fused(*steps: Any) -> dict[str, Any]:
    """Return an operator that holds others."""
    return step("general_fused_op", fused_op_list=list(steps))


def refused_operators() -> list[Case]:
    """Operators that run code, fetch, send, write elsewhere, or that nobody reviewed."""
    table = [
        ("python_lambda_mapper", {"lambda_str": "lambda s: __import__('os')"}, "runs code"),
        ("python_file_mapper", {"file_path": "recipes/run.py"}, "runs code"),
        ("remove_repeat_sentences_mapper", {"tokenizer": "lambda s: [s]"}, "runs code"),
        ("image_ohem_selector", {"score_file": "score.py"}, "runs code"),
        ("export_to_lerobot_mapper", {}, "starts other programs"),
        ("image_mmpose_mapper", {}, "starts other programs"),
        ("vggt_mapper", {}, "starts other programs"),
        ("video_undistort_mapper", {}, "starts other programs"),
        ("image_tagging_mapper", {}, "clones a repository"),
        ("image_sam_3d_body_mapper", {}, "clones a repository"),
        ("download_file_mapper", {"save_dir": "artifacts/x"}, "network"),
        ("s3_download_file_mapper", {}, "network"),
        ("s3_upload_file_mapper", {}, "network"),
        ("image_tagging_vlm_mapper", {"is_api_model": True}, "service"),
        ("optimize_qa_mapper", {"api_or_hf_model": "gpt-4o"}, "service"),
        ("optimize_query_mapper", {}, "service"),
        ("calibrate_qa_mapper", {"api_model": "gpt-4o"}, "service"),
        ("extract_entity_attribute_mapper", {"api_endpoint": "http://10.0.0.1"}, "service"),
        ("extract_keyword_mapper", {"api_model": "gpt-4o"}, "service"),
        ("pair_preference_mapper", {}, "service"),
        ("llm_quality_score_filter", {}, "service"),
        ("text_embd_similarity_filter", {}, "service"),
        ("human_preference_annotation_mapper", {"api_key": "k"}, "service"),
        ("generate_qa_from_text_mapper", {"hf_model": "models/qa"}, "language model"),
        ("image_blur_mapper", {"save_dir": "artifacts/x"}, "writes new pictures"),
        ("image_face_blur_mapper", {}, "writes new pictures"),
        ("image_diffusion_mapper", {"hf_diffusion": "models/sd"}, "writes new pictures"),
        ("image_remove_background_mapper", {}, "writes new pictures"),
        ("sdxl_prompt2prompt_mapper", {}, "downloads a model"),
        ("image_detection_yolo_mapper", {}, "pickles"),
        ("image_segment_mapper", {}, "pickles"),
        ("flagged_words_filter", {"flagged_words_dir": "/etc"}, "downloads"),
        ("perplexity_filter", {}, "downloads"),
        ("language_id_score_filter", {}, "downloads"),
        ("text_action_filter", {}, "downloads"),
        ("ray_document_deduplicator", {"redis_address": "redis://10.0.0.1"}, "cluster"),
        ("ray_bts_minhash_deduplicator", {}, "cluster"),
        ("fused_sequential_batch_op", {}, "past the checks"),
        ("latex_merge_tex_mapper", {}, "opens files"),
        ("in_context_influence_filter", {}, "another data set"),
        ("naive_grouper", {}, "merges samples"),
        ("mllm_mapper", {"hf_model": "models/x"}, "list"),
        ("video_duration_filter", {}, "video or sound"),
        ("forget_measurements_mapper", {}, "by the run itself"),
        ("words_num_filtr", {}, "did you mean"),
        ("words_num_f\u0456lter", {}, "ASCII"),
        ("\uff50ython_lambda_mapper", {}, "ASCII"),
        ("Python_Lambda_Mapper", {}, "python_lambda_mapper"),
        ("words_num_filter ", {}, "ASCII"),
        ("../words_num_filter", {}, "ASCII"),
        ("words_num_filter\nname", {}, "ASCII"),
        ("", {}, "ASCII"),
        ("a" * 5000, {}, "ASCII"),
    ]
    return [
        Case(f"operator {name[:40]!r}", written([step(name, **given)]), word)
        for name, given, word in table
    ]


def nested_operators() -> list[Case]:
    """The same refusals wherever an operator can hide."""
    dangerous: dict[str, dict[str, Any]] = {
        "python_lambda_mapper": {"lambda_str": "print"},
        "s3_upload_file_mapper": {},
        "image_blur_mapper": {},
        "calibrate_qa_mapper": {},
    }
    cases = []
    for name, given in dangerous.items():
        bad, harmless = step(name, **given), step("words_num_filter", min_num=1)
        by_class = {"class_name": name, "kwargs": given}
        sorting = {"by": "statistic", "operator": name, "parameters": given}
        places = {
            "after a harmless one": written([harmless, bad]),
            "in a fused one": written([fused(harmless, bad)]),
            "in a fused one in a fused one": written([fused(fused(bad))]),
            "by class name in a fused one": written([fused(by_class)]),
            "in a branch": plan([bad]),
            "in a fused one in a branch": plan([harmless, fused(bad)]),
            "in order.operator": plan([], order=sorting),
            "in order.operator's parameters": plan(
                [], order={**sorting, "operator": "general_fused_op", "parameters": fused(bad)[
                    "general_fused_op"]}
            ),
        }  # fmt: skip
        cases += [Case(f"{name} {place}", text, name) for place, text in places.items()]
    return cases


def options() -> list[Case]:
    """Global options that read, write, connect or run, and values that are not what they say."""
    refused = {
        "custom_operator_paths": ["x.py"],
        "dataset": {"configs": [{"type": "remote", "source": "huggingface", "path": "x"}]},
        "load_dataset_kwargs": {"data_files": "/etc/passwd"},
        "load_kwargs": {"trust_remote_code": True},
        "generated_dataset_config": {"type": "x"},
        "export_type": "s3",
        "export_extra_args": {"endpoint_url": "http://10.0.0.1"},
        "export_aws_credentials": {"aws_access_key_id": "x"},
        "export_in_parallel": True,
        "ray_address": "ray://10.0.0.1:10001",
        "executor_type": "ray",
        "hpo_config": "recipes/hpo.yaml",
        "env": {"LD_PRELOAD": "x.so"},
        "work_dir": "elsewhere",
        "temp_dir": "elsewhere",
        "ds_cache_dir": "elsewhere",
        "checkpoint_dir": "elsewhere",
        "event_log_dir": "elsewhere",
        "encryption_key_path": "recipes/key",
        "open_monitor": True,
        "open_tracer": True,
        "use_checkpoint": True,
        "validators": [{"type": "x"}],
        "config": "other.yaml",
        "auto": True,
        "strict_preflight": False,
        "suffixes": [".py"],
        "Np": 1,
    }
    wrong = {
        "dataset_path": ["/etc/passwd", "../seed.jsonl", "~/seed.jsonl", "s3://b/x", "\\\\host\\x",
                         "C:\\x", "$HOME/x", "${HOME}/x", "data/{0.__class__}.jsonl", "", 3,
                         "a\u202eb.jsonl", "data/.git/config", ["data/seed.jsonl"]],
        "export_path": ["synth.yaml", "recipes/baseline.yaml", "data/seed/seed.jsonl",
                        "artifacts/../synth.yaml", "artifacts/x.py", "hdfs://h/x", "runs/x.jsonl"],
        "project_name": ["../x", "a\x1b[2J", "x" * 300, "$(id)"],
        "np": [0, -1, 65, 1.5, "1", True, 10**30],
        "skip_op_error": [True, "no", 0],
        "text_keys": ["__dj__stats__", ["text"]],
        "image_key": ["id"],
    }  # fmt: skip
    cases = [Case(f"option {key}", written([], **{key: value}), key)
             for key, value in refused.items()]  # fmt: skip
    for key, values in wrong.items():
        cases += [Case(f"{key} {v!r}"[:120], written([], **{key: v}), key) for v in values]
    left_out = yaml.safe_dump({"np": 1, "process": []})
    return [*cases, Case("skip_op_error left out", left_out, "skip_op_error")]


def parameters() -> list[Case]:
    """Parameters of reviewed operators with values that lead out, run code or cannot be."""
    similarity, captions = "image_text_similarity_filter", "image_captioning_mapper"
    words, shape = "words_num_filter", "image_shape_filter"
    clip = {"hf_clip": "models/clip"}
    model = [
        "http://10.0.0.1/model", "https://huggingface.co/x/y", "openai/clip-vit-base-patch32",
        "/etc", "../clip", "models/../../clip", "~/clip", "$HOME/clip", "models/${X}",
        "file:///etc", "\\\\host\\share\\clip", "C:/clip", "models/clip\x00", "models/c\u200blip",
        "", 7, None, "models/out", "models/pickled", "models/mixed",
        "models/code", "models/deep", "models/none",
    ]  # fmt: skip
    table: list[tuple[str, dict[str, Any], str]] = [
        *((similarity, {"hf_clip": value}, "hf_clip") for value in model),
        *(
            (similarity, {**clip, "trust_remote_code": value}, "trust_remote_code")
            for value in (True, "True", "yes", 1, "on", [True])
        ),
        (captions, {"hf_img2seq": "models/clip", "model_params": {}}, "model_params"),
        (captions, {"hf_img2seq": "models/clip", "caption_num": 10**9}, "caption_num"),
        (captions, {"hf_img2seq": "models/clip", "prompt_key": "__dj__meta__"}, "prompt_key"),
        (words, {"runtime_env": {"pip": ["x"]}}, "runtime_env"),
        (words, {"work_dir": "/tmp"}, "work_dir"),
        (words, {"stats_export_path": "/tmp/x"}, "stats_export_path"),
        (words, {"tokenization": True}, "tokenization"),
        (words, {"lang": "../../x"}, "lang"),
        (words, {"skip_op_error": True}, "skip_op_error"),
        (words, {"num_proc": 10**6}, "num_proc"),
        (words, {"batch_size": 2**40}, "batch_size"),
        (words, {"batch_size": 0}, "batch_size"),
        (words, {"min_num": float("nan")}, "min_num"),
        (words, {"min_num": float("inf")}, "min_num"),
        (words, {"max_num": 10**400}, "max_num"),
        (words, {"max_num": -(2**70)}, "max_num"),
        (words, {"min_num": "3"}, "min_num"),
        (words, {"min_num": True}, "min_num"),
        (words, {"min_num": [3]}, "min_num"),
        (words, {"min_num": {"value": 3}}, "min_num"),
        (words, {"min_num": 9, "max_num": 3}, "min_num"),
        (words, {"min_num": -1}, "min_num"),
        (words, {"min_numb": 3}, "min_num"),
        (words, {"text_key": "__class__"}, "text_key"),
        (words, {"text_key": "images"}, "text_key"),
        (words, {"accelerator": "tpu; id"}, "accelerator"),
        (words, {"mem_required": "$(id)"}, "mem_required"),
        (words, {"__init__": 1}, "__init__"),
        (words, {"m\u0456n_num": 1}, "ASCII"),
        (similarity, {**clip, "min_score": 2}, "min_score"),
        (similarity, {**clip, "reduce_mode": "eval"}, "reduce_mode"),
        (similarity, {**clip, "any_or_all": "none"}, "any_or_all"),
        (similarity, {**clip, "image_key": "id"}, "image_key"),
        (shape, {"min_width": 5, "max_width": 4}, "min_width"),
        ("image_size_filter", {"min_size": "1TB", "max_size": "1KB"}, "min_size"),
        ("image_size_filter", {"min_size": "1e9"}, "min_size"),
        ("image_face_count_filter", {"cv_classifier": "/etc/passwd"}, "cv_classifier"),
        ("image_face_count_filter", {"cv_classifier": "none.xml"}, "cv_classifier"),
        ("random_selector", {"select_ratio": 3.5}, "select_ratio"),
        ("replace_content_mapper", {"pattern": "(", "repl": ""}, "pattern"),
        ("text_chunk_mapper", {"max_len": 10, "overlap_len": 10}, "overlap_len"),
        ("text_chunk_mapper", {"split_pattern": None}, "max_len"),
        ("text_chunk_mapper", {"max_len": 10, "tokenizer": "gpt-4o"}, "tokenizer"),
        ("document_minhash_deduplicator", {"num_bands": 4}, "num_rows_per_band"),
        ("document_minhash_deduplicator", {"num_permutations": 10**7}, "num_permutations"),
        ("document_simhash_deduplicator", {"hamming_distance": 9}, "hamming_distance"),
        ("general_field_filter", {"filter_condition": "__import__('os')"}, "not allowed"),
        ("general_field_filter", {"filter_condition": "text.__class__ == 1"}, "field"),
        ("general_field_filter", {"filter_condition": "[x for x in text]"}, "not allowed"),
        ("general_field_filter", {"filter_condition": "9**9**9 > 1"}, "not allowed"),
        ("general_field_filter", {"filter_condition": "a" * 5000}, "too long"),
        ("general_field_filter", {"filter_condition": "10 < text.x.y"}, "no parts"),
        ("specified_field_filter", {"field_key": "/etc/passwd"}, "field"),
        ("specified_field_filter", {}, "field_key"),
        ("token_num_filter", {"hf_tokenizer": "gpt2"}, "hf_tokenizer"),
        ("sentence_augmentation_mapper", {"hf_model": "http://x/y"}, "hf_model"),
        ("batched_image_text_similarity_filter", {**clip, "dtype": "int8"}, "dtype"),
        ("batched_image_text_similarity_filter", {**clip, "pairs_per_call": 0}, "pairs_per_call"),
    ]
    return [
        Case(f"{name} {given!r}"[:120], written([step(name, **given)]), word)
        for name, given, word in table
    ]


def orders() -> list[Case]:
    """Operators that cannot work where they are."""
    score = "__dj__stats__.num_words"
    top = step("topk_specified_field_selector", field_key=score, top_ratio=0.5)
    cleaning = step("whitespace_normalization_mapper")
    repeats = "character_repetition_filter"
    table = [
        ("score that nobody writes", [top], "num_words"),
        ("score before its filter", [top, step("words_num_filter")], "num_words"),
        ("score before a mapper", [step("words_num_filter"), cleaning, top], "num_words"),
        ("score measured otherwise", [step(repeats, rep_len=10), step(repeats, rep_len=2)],
         "rep_len"),
        ("parameter that is inherited",
         [step("words_num_filter", min_num=3), cleaning, step("words_num_filter")], "min_num"),
        ("selector fused", [fused(step("random_selector", select_num=5))], "random_selector"),
        ("deduplicator fused", [fused(step("document_deduplicator"))], "document_deduplicator"),
        ("lists as single values",
         [step("frequency_specified_field_selector", field_key="images")], "images"),
    ]  # fmt: skip
    cases = [Case(name, written(process), word) for name, process, word in table]
    mapper = plan([], order={"by": "statistic", "operator": "clean_links_mapper"})
    return [
        *cases,
        *(Case(f"{name}, in a branch", plan(process), word) for name, process, word in table),
        Case("mapper in order.operator", mapper, "order.operator"),
    ]


def texts() -> list[Case]:
    """Files that are dangerous or misleading before any operator is looked at."""
    head = "np: 1\nskip_op_error: false\n"
    empty = f"{head}process: []\n"
    bomb = "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(9)
    )
    tags = {
        "python/object/apply:os.system ['id']": "tag",
        "python/name:os.system": "tag",
        "python/object/new:type ['x', [], {}]": "tag",
        "binary aGk=": "tag",
        "set {a, b}": "tag",
        "mine x": "tag",
        "omap [a: 1]": "tag",
    }
    table = {
        "aliases that grow": (f"{bomb}{empty}", "too large"),
        "alias to itself": (f"{head}process: &a [*a]\n", "itself"),
        "merge key": (f"a: &a {{np: 1}}\n<<: *a\n{empty}", "tag"),
        "deep lists": (f"{head}process: {'[' * 5000}{']' * 5000}\n", "deep"),
        "deep mappings": (f"{head}process: {'{a: ' * 900}1{'}' * 900}\n", "deep"),
        "deep blocks": (head + "".join(" " * i + "a:\n" for i in range(60)), "deep"),
        "key twice": (f"skip_op_error: true\n{empty}", "twice"),
        "operator's parameter twice": (
            f"{head}process:\n- words_num_filter: {{min_num: 1, min_num: 9}}\n", "twice"),
        "key that is a list": (f"{empty}? [a]\n: 1\n", "Key"),
        "key that is a number": (f"{empty}1: 2\n", "Key"),
        "key that is true": (f"{empty}yes: 2\n", "Key"),
        "key that is null": (f"{empty}~: 2\n", "Key"),
        "date": (f"{empty}project_name: 2026-01-01\n", "tag"),
        "two documents": (f"{empty}---\n{empty}", "YAML"),
        "anchor of nothing": (f"{head}process: *nothing\n", "YAML"),
        "tab": (f"{head}process:\n\t- a\n", "YAML"),
        "directive": (f"%TAG ! tag:yaml.org,2002:python/\n---\n{head}process: !name:os.x\n", "tag"),
        "terminal sequence in a comment": (f"# title: \x1b[2Jharmless\n{empty}", "Hidden"),
        "reversed text in a comment": (f"# reason: \u202eelbissop\n{empty}", "Hidden"),
        "nothing between letters": (f"{empty}project_name: a\u200bb\n", "Hidden"),
        "NUL": (f"{empty}project_name: a\x00b\n", "Hidden"),
        "NUL written out": (f'{empty}project_name: "a\\0b"\n', "Hidden"),
        "line separator": (f"# title: a\u2028process: []\n{empty}", "Hidden"),
        "escape in a parameter": (
            f'{head}process:\n- replace_content_mapper: {{repl: "\\e[2J"}}\n', "Hidden"),
        "megabyte": (empty + "# padding\n" * 100_000, "too long"),
        "ten thousand operators": (head + "process:\n" + "- a:\n" * 10_000, "too large"),
        "long text": (f"{empty}project_name: {'x' * 50_000}\n", "too long"),
        "number of many digits": (f"{head}process: []\nnp: {'9' * 5000}\n", ""),
        "list": ("- a\n", "mapping"),
        "text": ("process\n", "mapping"),
        "nothing": ("", "mapping"),
        "process is a mapping": (f"{head}process: {{words_num_filter: {{}}}}\n", "process"),
        "operator is text": (f"{head}process: [python_lambda_mapper]\n", "operator 1"),
        "two operators in one": (f"{head}process: [{{a: {{}}, b: {{}}}}]\n", "operator 1"),
        "parameters are a list": (f"{head}process: [{{words_num_filter: [1]}}]\n", "operator 1"),
        "process and branches": (f"{empty}branches: [{{name: a, process: []}}]\n", "branches"),
        "plan's field without branches": (f"{empty}order: {{by: given}}\n", "order"),
        "branch name with a path": (f"{head}branches: [{{name: ../a, process: []}}]\n", "name"),
        "branch with an option": (
            f"{head}branches: [{{name: a, process: [], export_path: /etc}}]\n", "export_path"),
        "endless repetition": (f"{head}branches: [{{name: a, process: [], repeat: 1000000}}]\n",
                               "repeat"),
    }  # fmt: skip
    return [
        *(Case(f"tag {tag}", f"{head}process: !!{tag}\n", word) for tag, word in tags.items()),
        *(Case(name, text, word) for name, (text, word) in table.items()),
    ]


CASES = [
    *refused_operators(),
    *nested_operators(),
    *options(),
    *parameters(),
    *orders(),
    *texts(),
]
