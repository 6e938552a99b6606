"""What the page says, in English and in Chinese. What comes from the commands, such as errors, is English alone."""

from collections.abc import Mapping

WORDS: dict[str, tuple[str, str]] = {
    # of the page
    "transfer": ("Transfer", "风格转换"),
    "train": ("Train", "训练"),
    "sample": ("Sample", "采样"),
    "checkpoint": ("Checkpoint", "检查点"),
    "refresh": ("Look again", "刷新列表"),
    "no_runs": (
        "**No checkpoint here yet.** Train one: open the tab *Train*, or type `python preprocess_latents.py` and "
        "`python train.py`, then press *Look again*. Checkpoints are looked for in `{}`.",
        "**这里还没有检查点。** 请先训练：打开“训练”页，或运行 `python preprocess_latents.py` 和 `python train.py`，"
        "然后点“刷新列表”。检查点在 `{}` 中查找。",
    ),
    # of transfers
    "picture": ("Picture", "图片"),
    "source": ("Style of the picture", "图片的风格"),
    "target": ("Style to give it", "目标风格"),
    "strength": ("Strength", "强度"),
    "strength_info": ("1 is the full transfer, 0 keeps the picture", "1 为完全转换，0 保持原图"),
    "scale": ("Guidance scale", "引导强度"),
    "scale_info": ("more is more of the style; 1 is none and costs half", "越大风格越强；1 为无引导，只需一半计算"),
    "auto": ("Scale as measured (auto)", "使用测得的强度（auto）"),
    "more": ("More settings", "更多设置"),
    "method": ("Method", "方法"),
    "steps": ("Steps a leg", "每程步数"),
    "floor": ("Keep at least this much structure (SSIM); 0: do not look", "至少保留的结构（SSIM）；0 表示不限制"),
    "size": ("Short side in pixels; 0: as it is", "短边像素；0 为原尺寸"),
    "certify": ("Certificate and structure file", "证书和结构文件"),
    "deep": ("16 bits a channel for download", "下载 16 位图片"),
    "go": ("Transfer", "转换"),
    "all_styles": ("All styles", "全部风格"),
    "before_after": ("Before and after", "转换前后"),
    "gallery": ("In all styles", "全部风格"),
    "files": ("Files to download", "下载文件"),
    "report": ("What was done", "结果说明"),
    "kept": ("From a structure file: on to another style, or back", "从结构文件出发：转到其他风格，或还原"),
    "structure": ("Structure file (.safetensors)", "结构文件 (.safetensors)"),
    "onward": ("To the style above", "转到上面的目标风格"),
    "back": ("Back to the picture", "还原图片"),
    "kept_result": ("From the structure file", "来自结构文件"),
    "guessed": (
        "Guessed style: **{}** (the network's own loss {:.3f}; the next, {}, {:.3f}). Change it above if it is wrong.",
        "推测的风格：**{}**（网络自身的损失 {:.3f}；其次是 {}，{:.3f}）。如不对，请在上面更改。",
    ),
    "not_guessed": ("Choose the style of the picture.", "请选择图片的风格。"),
    "give_picture": ("give a picture first", "请先上传图片"),
    "give_structure": ("give a structure file first", "请先上传结构文件"),
    "evaluations": ("{} network evaluations, {:.2f} s", "{} 次网络计算，{:.2f} 秒"),
    "no_certificate": (
        "no certificate: {} is not exactly reversible; the method alf is",
        "没有证书：{} 不能精确逆转；alf 方法可以",
    ),
    # of training
    "folder": ("Folder of pictures (one folder a style)", "图片文件夹（每种风格一个文件夹）"),
    "no_pictures": (
        "**No pictures here yet.** Put one folder of pictures a style below `{}`, such as `{}/photo` and "
        "`{}/painting`, and press *Look again*.",
        "**这里还没有图片。** 请在 `{}` 下为每种风格建一个图片文件夹，例如 `{}/photo` 和 `{}/painting`，"
        "然后点“刷新列表”。",
    ),
    "config": ("Config", "配置"),
    "epochs": ("Epochs; 0: as the config says", "轮数；0 按配置"),
    "side": ("Side of the training squares in pixels; 0: as the config says", "训练图片边长（像素）；0 按配置"),
    "batch": ("Batch; 0: as the config says", "批大小；0 按配置"),
    "dct": ("Built-in codec dct, which needs no weights", "使用内置编解码器 dct（无需权重）"),
    "look": ("Look at the folder", "检查文件夹"),
    "found": ("What was found, and the plan", "检查结果与内存计划"),
    "commands": ("The same, typed", "等价的命令"),
    "start": ("Start, or go on", "开始或继续"),
    "stop": ("Stop", "停止"),
    "run": ("Run", "训练"),
    "losses": ("Training loss by quarter of t", "按 t 的四分段的训练损失"),
    "figures": ("Validation", "验证"),
    "previews": ("Previews: held-out pictures in other styles", "预览：留出图片转为其他风格"),
    "log": ("What the commands print", "命令的输出"),
    "preparing": ("**{}**: preparing the pictures", "**{}**：正在预处理图片"),
    "training": ("**{}**: training", "**{}**：训练中"),
    "elsewhere": ("**{}**: training, started elsewhere", "**{}**：训练中（在别处启动）"),
    "stopping": ("**{}**: stopping; it saves first", "**{}**：正在停止，先保存"),
    "at_rest": ("**{}**: not under way", "**{}**：未在运行"),
    "comma": (", ", "，"),
    "place": ("step {}, epoch {:.4g}", "第 {} 步，第 {:.4g} 轮"),
    "of_epochs": (" of {}", " / 共 {} 轮"),
    "speed": ("{} pictures/s", "每秒 {} 张图片"),
    "left": ("about {} left", "约剩 {}"),
    # of samples
    "styles": ("Styles; none: all", "风格；不选则为全部"),
    "count": ("Samples of each", "每种数量"),
    "seed": ("Seed", "随机种子"),
    "generate": ("Sample", "采样"),
    "grid": ("All samples, a row a style", "全部样本，每行一种风格"),
    "singles": ("One by one", "逐张"),
}
LOCALES = {"en": 0, "zh": 1, "zh-CN": 1, "zh-TW": 1}


def translations() -> dict[str, dict[str, str]]:
    """Locale -> key -> words, as gradio wants them."""
    return {locale: {key: words[place] for key, words in WORDS.items()} for locale, place in LOCALES.items()}


def say(key: str, headers: Mapping[str, str] | None, *values: object) -> str:
    """A sentence in the language that a browser asks for first: Chinese, or else English."""
    accepted = (headers or {}).get("accept-language", "")
    return WORDS[key][accepted.strip().lower().startswith("zh")].format(*values)
