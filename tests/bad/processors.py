"""Kinds 7, 8, 19: image processors."""

from __future__ import annotations

from collections.abc import Iterator

from bad.case import GOLDEN, RUN, Case, Row, rows
from bad.changes import NOT_JSON, append, both, literal, put
from bad.configs import GRIDS


def processors() -> Iterator[Case]:
    def of_recipe(text: str, said: str) -> Row:
        return append(f"image_processor: {text}\n"), said

    yield from rows(
        7,
        "captioner",
        GOLDEN,
        "r.yaml",
        of_recipe("{image_std: [0, 0, 0]}", "image_std"),
        of_recipe("{image_std: [.nan, 1, 1]}", "image_std"),
        of_recipe("{image_mean: [.inf, 1, 1]}", "image_mean"),
        of_recipe("{rescale_factor: .nan}", "rescale_factor"),
        of_recipe("{rescale_factor: 1e40}", "rescale_factor"),
    )
    yield from rows(
        8,
        "captioner",
        GOLDEN,
        "r.yaml",
        of_recipe("{sizee: 5}", "sizee"),
        of_recipe("{do_resiz: true}", "do_resiz"),
        of_recipe("{image_mean: [1]}", "image_mean"),
        of_recipe("{image_mean: x}", "image_mean"),
        of_recipe("{image_mean: null, image_std: x}", "image_std"),
        of_recipe("{size: 0}", "size"),
        of_recipe("{size: -5}", "size"),
        of_recipe("{size: x}", "size"),
        of_recipe("{size: {height: 100000, width: 100000}}", "size"),
        of_recipe("{size: {heigth: 16, width: 16}}", "size"),
        (append("image_processor: {size: {height: 8, width: 8}}\n"), "image_processor", "preprocessor_config.json"),
        of_recipe("{resample: 99}", "resample"),
        of_recipe("{resample: x}", "resample"),
        of_recipe("{resample: -1}", "resample"),
        of_recipe("{rescale_factor: x}", "rescale_factor"),
        of_recipe("{do_resize: 5}", "do_resize"),
        of_recipe("{do_normalize: x}", "do_normalize"),
        of_recipe("{image_processor_type: Nope}", "Nope"),
        of_recipe("{image_processor_type: [1]}", "image_processor_type"),
        of_recipe("{crop_size: x, do_center_crop: true}", "crop_size"),
        of_recipe("{crop_size: {height: 100000, width: 100000}, do_center_crop: true}", "crop_size"),
    )
    changes = (
        (put("image_processor_type", ["SiglipImageProcessor"]), "image_processor_type"),
        (put("image_processor_type", 5), "image_processor_type"),
        (put("image_processor_type", "Nope"), "Nope"),
        (put("image_processor_type", "N" * 5000), "image_processor_type"),
        (put("image_mean", [0.5, 0.5]), "image_mean"),
        (put("image_mean", "x"), "image_mean"),
        (put("image_mean", {}), "image_mean"),
        (put("image_std", [0.5]), "image_std"),
        (put("image_std", [0, 0, 0]), "image_std"),
        (put("image_std", 0), "image_std"),
        (literal("image_std", "NaN"), ""),
        (literal("image_mean", "[Infinity, 1, 1]"), ""),
        (put("image_std", ["x"] * 3), "image_std"),
        (put("rescale_factor", "x"), "rescale_factor"),
        (literal("rescale_factor", "NaN"), ""),
        (put("rescale_factor", [1]), "rescale_factor"),
        (put("rescale_factor", 1e300), "rescale_factor"),
        (put("resample", 99), "resample"),
        (put("resample", "x"), "resample"),
        (put("resample", [2]), "resample"),
        (put("size", 0), "size"),
        (put("size", -1), "size"),
        (put("size", "x"), "size"),
        (put("size", [1, 2, 3]), "size"),
        (put("size", {"height": 0, "width": 0}), "size"),
        (put("size", {"height": "16", "width": 16}), "size"),
        (put("size", {"height": 100_000, "width": 100_000}), "size"),
        (put("size", {"height": 10**12, "width": 16}), "size"),
        (put("size", {"shortest_edge": 10**9}), "size"),
        (put("size", {"height": 16.5, "width": 16}), "size"),
        (put("do_resize", "x"), "do_resize"),
        (put("do_rescale", 5), "do_rescale"),
        (put("do_normalize", []), "do_normalize"),
        (both(put("do_center_crop", True), put("crop_size", "x")), "crop_size"),
        (both(put("do_center_crop", True), put("crop_size", {"height": 10**6, "width": 10**6})), "crop_size"),
        (both(put("do_center_crop", True), put("crop_size", {"shortest_edge": 16})), "crop_size"),
        *NOT_JSON,
    )
    yield from rows(19, "captioner", GOLDEN, "base/preprocessor_config.json", *changes)
    yield from rows(25, "captioner", f"{RUN} --backend onnx", "work/repo/preprocessor_config.json", *changes)
    yield from rows(
        19,
        "chat",
        GOLDEN,
        "base/processor_config.json",
        (put("image_processor", "x"), "image_processor"),
        (put("image_processor", []), "image_processor"),
        (put("patch_size", 0), "patch_size"),
        (put("patch_size", "x"), "patch_size"),
        (put("patch_size", -8), "patch_size"),
        (put("image_processor.size", 10**6), "size"),
        (put("num_additional_image_tokens", "x"), "num_additional_image_tokens"),
        (put("image_token", 5), "image_token"),
        (put("vision_feature_select_strategy", 5), "vision_feature_select_strategy"),
        *NOT_JSON,
    )
    yield from _of_patches()


def _of_patches() -> Iterator[Case]:
    """Processors that cut pictures into patches, and write tokens for them."""

    def recorded(file: str, *changes: Row) -> Iterator[Case]:
        yield from rows(19, "families", f"golden {file.partition('/')[0]}.yaml", file, *changes)

    for name in GRIDS:
        file = f"{name}/preprocessor_config.json"
        values = (0, "4", 10**9, [], 8) if name == "qwen2_vl" else (0, 8)
        for key in ("patch_size", "merge_size", "temporal_patch_size"):
            yield from recorded(file, *((put(key, value), key) for value in values))
        if name not in ("qwen2_vl", "glm_ocr"):  # of one class
            continue
        yield from recorded(
            file,
            (put("size", {"shortest_edge": 0}), "size"),
            (put("size", {"longest_edge": 10**12}), "size"),
            (put("size", {"shortes_edge": 64}), "size"),
            (put("size", "x"), "size"),
            (put("min_pixels", 10**12), "min_pixels"),
            (put("max_pixels", "x"), "max_pixels"),
            (put("image_processor_type", "Nope"), "Nope"),
            (put("image_mean", [0.5]), "image_mean"),
            (put("image_std", 0), "image_std"),
        )
        said = "image tokens" if name != "glm_ocr" else ""
        yield from rows(18, "families", f"golden {name}.yaml", f"{name}/config.json", (put("image_token_id", 5), said))
    for name in ("mistral3", "lighton_ocr"):
        yield from recorded(
            f"{name}/preprocessor_config.json",
            *((put("patch_size", value), "patch_size") for value in (0, "4", 10**9, [])),
            (put("size", {"longest_edge": 0}), "size"),
            (put("size", {"longest_edge": 10**9}), "size"),
            (put("image_processor_type", "Nope"), "Nope"),
        )
        yield from recorded(
            f"{name}/processor_config.json",
            *((put("patch_size", value), "patch_size") for value in (0, "4", 10**9, [])),
            *((put("spatial_merge_size", value), "spatial_merge_size") for value in (0, "2", 10**9, [])),
            *((put("image_token", value), "image_token") for value in (5, [], {})),
            *((put("image_break_token", value), "image_break_token") for value in (5, [], {})),
        )
    file = "lfm2_vl/preprocessor_config.json"
    for key in ("encoder_patch_size", "downsample_factor", "tile_size", "max_tiles", "max_image_tokens"):
        yield from recorded(file, *((put(key, value), key) for value in (0, "4", 10**9)))
    yield from recorded(
        file,
        (put("encoder_patch_size", 8), "encoder_patch_size"),
        (put("downsample_factor", 4), "downsample_factor"),
        (put("tile_size", 20), "tile_size"),
        (put("min_tiles", 5), "min_tiles"),
        (put("min_image_tokens", 7), "min_image_tokens"),
        (put("max_pixels_tolerance", 0), "max_pixels_tolerance"),
        (put("tile_size", 8000), "max_tiles"),
    )
    yield from recorded(
        "florence2/processor_config.json",
        *((put("image_processor.size", value), "size") for value in (0, "x", {"height": 10**9, "width": 64})),
        *((put("post_processor_config", value), "post_processor_config") for value in (5, "x", [])),
        (put("image_processor", "x"), "image_processor"),
    )
