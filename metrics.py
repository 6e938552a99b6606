"""What a transfer is worth: is the style right, is the picture still the same. Tensors in, numbers out.

Pixels are (B, 3, H, W) in [-1, 1] throughout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def luminance(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 1, H, W) in [0, 1], by the weights of ITU-R BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=pixels.device).view(1, 3, 1, 1)
    return ((pixels + 1) / 2 * weights).sum(1, keepdim=True)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(B,) peak signal to noise ratio in dB; infinite for equal pictures."""
    error = ((a - b) / 2).square().flatten(1).mean(1)
    return -10 * torch.log10(error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """(B,) structural similarity of luminance in [-1, 1], 1 for equal pictures.

    Wang et al., "Image quality assessment", IEEE TIP 13(4), 2004, eq. 13: Gaussian window of deviation 1.5 over
    11 x 11 pixels, K1 = 0.01, K2 = 0.03, mean over the positions where the window fits (ValueError if there are none).
    """
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs pictures of 11 x 11 pixels or more, not {a.shape[-2]} x {a.shape[-1]}")
    x, y = luminance(a), luminance(b)
    offsets = torch.arange(11, device=x.device, dtype=x.dtype) - 5
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image, window)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (score / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).flatten(1).mean(1)


class StyleClassifier(nn.Module):
    """A small convolutional network that tells styles apart, trained on the user's own folders.

    Pictures are judged by their texture, so crops and mirror images are as good as the whole: it sees both.
    """

    def __init__(self, num_styles: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width, num_styles)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_styles)."""
        return self.head(self.features(pixels).mean((2, 3)))

    @torch.inference_mode()
    def predict(self, pixels: Tensor) -> Tensor:
        """(B,) the most likely style of each picture."""
        return torch.cat([self(part).argmax(1) for part in pixels.split(64)])


def train_style_classifier(
    pixels: Tensor,  # (N, 3, S, S)
    styles: Tensor,  # (N,) int64
    num_styles: int,
    seed: int = 0,
    steps: int = 300,
    batch_size: int = 64,
) -> StyleClassifier:
    """Train on random mirrored crops of 7/8 of the side, each style drawn equally often; deterministic on a CPU."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StyleClassifier(num_styles)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    weights = 1.0 / styles.bincount(minlength=num_styles)[styles].double()
    crop = pixels.shape[-1] * 7 // 8
    for _ in range(steps):
        index = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
        top, left = torch.randint(0, pixels.shape[-1] - crop + 1, (2,), generator=generator).tolist()
        part = pixels[index, :, top : top + crop, left : left + crop]
        if torch.rand((), generator=generator) < 0.5:
            part = part.flip(-1)
        loss = F.cross_entropy(model(part), styles[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model.eval()
