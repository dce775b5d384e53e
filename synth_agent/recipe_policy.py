"""What a recipe from anybody may name: reviewed operators, options, parameters and their bounds.

Owns the tables that `recipe_checks`, `recipe_paths` and `recipe_order` decide by. What is not
listed as allowed is refused. Names and bounds come from reading the sources of Data-Juicer 1.6.1.
"""

from __future__ import annotations

import re
from typing import Any

from synth_agent.catalogue import OperatorSpec

OPTIONS: dict[str, str] = {
    "project_name": "str",
    "dataset_path": "path",
    "export_path": "path",
    "np": "int",
    "auto_op_parallelism": "bool",
    "skip_op_error": "bool",
    "turbo": "bool",
    "text_keys": "str",
    "image_key": "str",
    "image_special_token": "str",
    "eoc_special_token": "str",
    "keep_stats_in_res_ds": "bool",
    "keep_hashes_in_res_ds": "bool",
}
"""Global options that a recipe may set. The rest of Data-Juicer's can read or write anywhere."""
REVIEWED_OPERATORS = frozenset(
    """
    batched_image_aesthetics_filter batched_image_captioning_mapper
    batched_image_text_matching_filter batched_image_text_similarity_filter
    alphanumeric_filter average_line_length_filter character_repetition_filter general_field_filter
    image_aesthetics_filter image_aspect_ratio_filter image_face_count_filter
    image_face_ratio_filter image_nsfw_filter image_shape_filter image_size_filter
    image_subplot_filter image_text_matching_filter image_text_similarity_filter
    image_watermark_filter maximum_line_length_filter special_characters_filter
    specified_field_filter specified_numeric_field_filter text_length_filter token_num_filter
    word_repetition_filter words_num_filter
    chinese_convert_mapper clean_copyright_mapper clean_email_mapper clean_html_mapper
    clean_ip_mapper clean_links_mapper expand_macro_mapper extract_tables_from_html_mapper
    fix_unicode_mapper general_fused_op image_captioning_mapper nlpaug_en_mapper nlpcda_zh_mapper
    pii_redaction_mapper punctuation_normalization_mapper remove_bibliography_mapper
    remove_comments_mapper remove_header_mapper remove_long_words_mapper
    remove_non_chinese_character_mapper remove_specific_chars_mapper remove_table_text_mapper
    remove_words_with_incorrect_substrings_mapper replace_content_mapper
    sentence_augmentation_mapper text_chunk_mapper whitespace_normalization_mapper
    document_deduplicator document_line_deduplicator document_minhash_deduplicator
    document_simhash_deduplicator image_deduplicator
    frequency_specified_field_selector random_selector range_specified_field_selector
    tags_specified_field_selector topk_specified_field_selector
    """.split()
)
"""Operators whose source was read: with the checks below they stay inside the workspace."""
UNREVIEWED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"ray_.*|.*_pipeline", "works on a cluster whose address the recipe brings"),
        (r"sdxl_.*", "downloads a model and writes pictures outside the workspace"),
        (r"image_detection_yolo_mapper|image_segment_mapper|detect_.*|imgdiff_.*", "loads pickles"),
        (r".*_with_uid", "needs a column that seed samples do not have"),
        (r"fused_sequential_batch_op", "builds operators past the checks; use general_fused_op"),
        (r"(video|audio)_.*", "works on video or sound, which seed samples do not have"),
        (r"latex_.*", "opens files that the samples name"),
        (r"sentence_split_mapper", "downloads a model"),
        (r"mllm_mapper", "replaces the text by a list, which training cannot read"),
        (r"forget_measurements_mapper", "is put in by the run itself wherever it is needed"),
        (r"suffix_filter", "needs file suffixes, which seed samples do not have"),
        (r"(text|image)_pair_.*", "compares two texts or pictures, seed samples have one"),
        (r"in_context_.*", "reads another data set and a model by name"),
        (r"agent_.*|tool_.*|usage_.*|dialog_.*", "works on dialogues with tools"),
        (r".*_(grouper|aggregator)", "merges samples, which the run could not follow any more"),
    )
)
"""Why other operators are refused, where the catalogue does not say it."""
BASE_PARAMETERS = frozenset(
    """
    text_key image_key batch_size num_proc skip_op_error turbo auto_op_parallelism accelerator
    cpu_required gpu_required mem_required num_cpus num_gpus memory
    min_closed_interval max_closed_interval reversed_range
    """.split()
)
"""Parameters of every operator that a recipe may set."""
REFUSED_NAMES: dict[str, str] = {
    "runtime_env": "it installs packages",
    "ray_execution_mode": "recipes run on one machine",
    "work_dir": "the run chooses the folder",
    "stats_export_path": "the run chooses where files go",
    "batch_meta_export_path": "the run chooses where files go",
    "calibration_json_path": "it reads a file that the recipe names",
    "tokenizer": "it looks a name up at a service or runs it as code",
    **dict.fromkeys(("env", "env_vars", "environment"), "it sets environment variables"),
    **dict.fromkeys(
        ("ray_address", "redis_address", "address", "host"), "it connects to another machine"
    ),
    **dict.fromkeys(
        ("api_endpoint", "api_base", "api_url", "base_url", "endpoint", "url", "proxies"),
        "it sends samples to an address that the recipe brings",
    ),
    **dict.fromkeys(
        ("api_key", "token", "use_auth_token", "export_aws_credentials", "notification_config"),
        "secrets and addresses do not belong in recipes",
    ),
    **dict.fromkeys(
        ("custom_operator_paths", "auto_map", "code_revision", "lambda_str", "score_file"),
        "it runs code that the recipe brings",
    ),
    **dict.fromkeys(
        ("load_kwargs", "load_dataset_kwargs", "hpo_config", "export_type", "dataset"),
        "it reads or writes outside the workspace",
    ),
}
"""Names that may occur at no depth. A person's permission for an operator lifts its own."""
MODEL_PARAMETERS = frozenset(
    {"model_params", "sampling_params", "engine_kwargs", "get_model_args", "processor_config"}
)
MODEL_VALUES = frozenset(
    """
    temperature top_p top_k min_p max_tokens max_new_tokens num_beams do_sample seed stop n
    repetition_penalty presence_penalty frequency_penalty torch_dtype dtype max_model_len
    trust_remote_code
    """.split()
)
"""What may be passed on to the loader of a model; anything else can reach the network or code."""
FIELDS = ("text", "id", "images")
"""Fields of a sample of the seed set."""
FIELD_PARAMETERS = frozenset(
    """
    text_key image_key prompt_key text_key_second query_key response_key history_key system_key
    instruction_key audio_key video_key image_bytes_key caption_key
    """.split()
)
PATTERNS = frozenset({"pattern", "ignore_pattern", "split_pattern", "output_pattern"})
TEXTS = PATTERNS | frozenset(
    """
    repl prompt system_prompt task_sentence chars_to_remove substrings extra_patterns
    input_template qa_pair_template reference_template field_template tag_list
    filter_condition field_key target_value target_tags lambda_str
    path_replacement email_replacement secret_replacement id_replacement phone_replacement
    id_card_replacement channel_id_replacement pem_replacement jwt_replacement url_replacement
    ip_replacement mac_replacement image_special_token eoc_special_token
    """.split()
)
"""Parameters whose strings are text that nothing opens, looks up or runs."""
LIMITS: dict[str, tuple[float, float]] = {
    "num_proc": (0, 64),
    "batch_size": (1, 10_000),
    "gpu_batch_size": (1, 4096),
    "images_per_call": (1, 4096),
    "pairs_per_call": (1, 4096),
    "seed": (0, 2**32 - 1),
    "try_num": (1, 20),
    "max_attempts": (1, 20),
    "timeout_seconds": (1, 3600),
    "concurrency": (1, 64),
    "max_tokens": (1, 8192),
    "strength": (0, 1),
    "guidance_scale": (0, 100),
    "radius": (0, 1000),
    "p": (0, 1),
    "caption_num": (1, 32),
    "aug_num": (1, 32),
    "max_new_tokens": (1, 8192),
    "num_beams": (1, 32),
    "temperature": (0, 10),
    "top_p": (0, 1),
    "num_permutations": (1, 2048),
    "num_bands": (1, 2048),
    "num_rows_per_band": (1, 2048),
    "window_size": (1, 10_000),
    "num_blocks": (1, 32),
    "rep_len": (1, 100_000),
    "frequency_threshold": (0, 2**31),
    "min_line_length": (0, 2**31),
    "lower_percentile": (0, 1),
    "upper_percentile": (0, 1),
    "min_col": (2, 20),
    "max_col": (2, 20),
    "min_face_count": (0, 10_000),
    "max_face_count": (0, 10_000),
    "min_horizontal_lines": (0, 100_000),
    "min_vertical_lines": (0, 100_000),
    "min_confidence": (0, 1),
    "canny_threshold1": (0, 10_000),
    "canny_threshold2": (0, 10_000),
    "hough_threshold": (1, 100_000),
    "max_line_gap": (0, 100_000),
    "angle_tolerance": (0, 90),
    "overlap_len": (0, 2**31),
    "num_cpus": (0, 1024),
    "num_gpus": (0, 1024),
    "cpu_required": (0, 1024),
    "gpu_required": (0, 1024),
}
"""Bounds, both inclusive, that the signatures leave out or that keep time and memory finite."""
CHOICES: dict[str, tuple[Any, ...]] = {
    "accelerator": ("cpu", "cuda", None),
    "mode": (
        *("s2t", "t2s", "s2tw", "tw2s", "s2hk", "hk2s", "s2twp", "tw2sp", "t2tw", "tw2t"),
        *("hk2t", "t2hk", "t2jp", "jp2t"),
    ),
}
UNTYPED: dict[str, tuple[str, ...]] = {
    "temperature": ("float",),
    "top_p": ("float", "null"),
    "max_new_tokens": ("int",),
    "num_beams": ("int",),
    "num_cpus": ("float", "null"),
    "num_gpus": ("float", "null"),
    "cpu_required": ("float", "null"),
    "gpu_required": ("float", "null"),
    "mem_required": ("float", "str", "null"),
    "memory": ("float", "str", "null"),
    "accelerator": ("str", "null"),
    "text_key": ("str", "null"),
    "text_key_second": ("str", "null"),
}
"""Types of parameters of reviewed operators that Data-Juicer leaves without an annotation."""
PACKAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "chinese_convert_mapper": (("opencc", "opencc"),),
    "clean_html_mapper": (("selectolax", "selectolax"),),
    "document_simhash_deduplicator": (("simhash", "simhash-pybind"),),
    "extract_tables_from_html_mapper": (("bs4", "beautifulsoup4"),),
    "fix_unicode_mapper": (("ftfy", "ftfy"),),
    "flagged_words_filter": (("sentencepiece", "sentencepiece"),),
    "batched_image_aesthetics_filter": (("aesthetics_predictor", "simple-aesthetics-predictor"),),
    "image_aesthetics_filter": (("aesthetics_predictor", "simple-aesthetics-predictor"),),
    "image_deduplicator": (("imagededup", "imagededup"),),
    "image_diffusion_mapper": (("diffusers", "diffusers"),),
    "image_face_blur_mapper": (("cv2", "opencv-contrib-python"),),
    "image_remove_background_mapper": (("rembg", "rembg"), ("onnxruntime", "onnxruntime")),
    "image_face_count_filter": (("cv2", "opencv-contrib-python"),),
    "image_face_ratio_filter": (("cv2", "opencv-contrib-python"),),
    "image_subplot_filter": (("cv2", "opencv-contrib-python"),),
    "language_id_score_filter": (("fasttext", "fasttext-predict"),),
    "nlpaug_en_mapper": (("nlpaug", "nlpaug"),),
    "nlpcda_zh_mapper": (("nlpcda", "nlpcda"),),
    "perplexity_filter": (("kenlm", "kenlm"), ("sentencepiece", "sentencepiece")),
    "phrase_grounding_recall_filter": (("nltk", "nltk"),),
    "sentence_split_mapper": (("nltk", "nltk"),),
    "stopwords_filter": (("sentencepiece", "sentencepiece"),),
    "text_action_filter": (("spacy", "spacy"),),
    "text_entity_dependency_filter": (("spacy", "spacy"),),
}
"""Packages that an operator imports and Data-Juicer does not require: module and package."""
INSTALL_COMMANDS: dict[str, str] = {
    "diffusers": 'pip install -e ".[diffusion]"',
    "nltk": 'pip install -e ".[phrases]"',
    # Its requirements would put transformers 4 in the place of 5; it works with 5.
    "simple-aesthetics-predictor": 'pip install --no-deps "simple-aesthetics-predictor==0.1.2"',
}
"""How to install a package where its name alone would not do."""
STATS: dict[str, tuple[str, ...]] = {
    "alphanumeric_filter": ("alnum_ratio",),
    "average_line_length_filter": ("avg_line_length",),
    "batched_image_aesthetics_filter": ("image_aesthetics_scores",),
    "batched_image_text_matching_filter": ("image_text_matching_score",),
    "batched_image_text_similarity_filter": ("image_text_similarity",),
    "character_repetition_filter": ("char_rep_ratio",),
    "general_field_filter": ("general_field_filter_condition",),
    "image_aesthetics_filter": ("image_aesthetics_scores",),
    "image_aspect_ratio_filter": ("aspect_ratios",),
    "image_face_count_filter": ("face_counts",),
    "image_face_ratio_filter": ("face_ratios",),
    "image_nsfw_filter": ("image_nsfw_score",),
    "image_shape_filter": ("image_width", "image_height"),
    "image_size_filter": ("image_sizes",),
    "image_subplot_filter": ("image_subplot_confidence", "subplot_detected"),
    "image_text_matching_filter": ("image_text_matching_score",),
    "image_text_similarity_filter": ("image_text_similarity",),
    "image_watermark_filter": ("image_watermark_prob",),
    "maximum_line_length_filter": ("max_line_length",),
    "special_characters_filter": ("special_char_ratio",),
    "text_length_filter": ("text_len",),
    "token_num_filter": ("num_token",),
    "word_repetition_filter": ("word_rep_ratio",),
    "words_num_filter": ("num_words",),
}
"""Scores that a filter writes, which later operators may read."""
MEASURING = frozenset(
    """
    rep_len tokenization hf_clip hf_blip hf_scorer_model hf_nsfw_model hf_watermark_model
    hf_tokenizer horizontal_flip vertical_flip reduce_mode filter_condition text_key image_key
    cv_classifier lowercase ignore_non_character window_size ignore_pattern num_permutations
    method consider_text canny_threshold1 canny_threshold2 hough_threshold min_line_length
    dtype max_line_gap angle_tolerance min_horizontal_lines min_vertical_lines
    """.split()
)
"""Parameters that change a score or a hash. Data-Juicer keeps scores by their name alone."""
STATS_FIELD = "__dj__stats__"
META_FIELD = "__dj__meta__"
SELECTORS_OF_SINGLE_VALUES = (
    "frequency_specified_field_selector",
    "tags_specified_field_selector",
)
MODEL_PREFIX = "hf_"
PATH_SUFFIXES = ("_dir", "_path", "_file", "_paths", "_files")
LOCAL_OR_SERVICE = "api_or_hf_model"
"""A parameter that is a folder or the name of a service's model, as switches beside it say."""
WRITTEN_FOLDER = "save_dir"
"""Where an operator writes pictures; left out, it writes beside the seed's own."""
WRITTEN_FOLDERS = (WRITTEN_FOLDER, "cache_dir")
FILE_PARAMETERS = ("cv_classifier", "tokenizer_model")
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy")
EXPORT_SUFFIXES = (".jsonl", ".json", ".parquet")


def is_read_parameter(name: str) -> bool:
    """Tell whether a parameter names a model or a file that its operator loads."""
    return name.startswith(MODEL_PREFIX) or name in (*FILE_PARAMETERS, LOCAL_OR_SERVICE)


def refusal(spec: OperatorSpec) -> str:
    """Return why an operator is refused unless a person allows it; empty when it is not."""
    if spec.name in REVIEWED_OPERATORS:
        return ""
    if spec.danger:
        return spec.danger
    for pattern, reason in UNREVIEWED:
        if pattern.fullmatch(spec.name):
            return reason
    return "is not among the operators that were reviewed"
