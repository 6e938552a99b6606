"""What a transfer is worth: is the style right, is the picture still the same. Tensors in, numbers out.

Pixels are (B, 3, H, W) in [-1, 1] throughout.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isonext.evaluation.intervals import Estimate

#################################################################################
#                                   Structure                                   #
#################################################################################


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


def edges(pixels: Tensor, threshold: float = 0.1) -> Tensor:
    """(B, 1, H, W) bool: where luminance changes by more than `threshold` of its range a pixel (Sobel)."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([across, across.T])[:, None].to(pixels)
    padded = F.pad(luminance(pixels), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernels).norm(dim=1, keepdim=True) > threshold


def edge_f1(a: Tensor, b: Tensor, reach: int = 1) -> Tensor:
    """(B,) F1 of the edges of a and b, where an edge counts as met within `reach` pixels; 1 where neither has any."""
    of_a, of_b = edges(a).float(), edges(b).float()
    near_a, near_b = (F.max_pool2d(edge, 2 * reach + 1, 1, reach) for edge in (of_a, of_b))
    count_a, count_b = (edge.flatten(1).sum(1) for edge in (of_a, of_b))
    precision = (of_a * near_b).flatten(1).sum(1) / count_a.clamp_min(1)
    recall = (of_b * near_a).flatten(1).sum(1) / count_b.clamp_min(1)
    score = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return torch.where(count_a + count_b == 0, 1.0, score)


def self_similarity(pixels: Tensor, cell: int = 8) -> Tensor:
    """(B, n, n) cosine similarities between the n cells of a picture, from what is in them and not where.

    A cell is described by its mean colour and by how strongly luminance changes along four directions, each taken
    relative to the picture's own mean and deviation: how the parts of a picture relate to each other is its layout,
    whatever they are painted in (Shechtman & Irani, CVPR 2007; Kolkin et al., arXiv:1904.12785).
    """
    y = luminance(pixels)
    steps = ((0, 1), (1, 0), (1, 1), (1, -1))
    change = [(y - y.roll(step, (2, 3))).abs() for step in steps]
    cells = F.avg_pool2d(torch.cat([pixels, *change], 1), cell).flatten(2)  # (B, 7, n)
    cells = (cells - cells.mean(2, keepdim=True)) / (cells.std(2, keepdim=True, correction=0) + 1e-3)
    directions = F.normalize(cells, dim=1, eps=1e-3)  # rounding in a flat picture is no direction
    return directions.mT @ directions


def self_similarity_distance(a: Tensor, b: Tensor) -> Tensor:
    """(B,) mean absolute difference of the self-similarities, from 0 to 2."""
    return (self_similarity(a) - self_similarity(b)).abs().flatten(1).mean(1)


def retrieval(results: Tensor, truth: Tensor, side: int = 16) -> Tensor:
    """(B,) bool: of all pictures in `truth`, is the one at its own place the most like each of `results`?

    By the correlation of luminance at `side` x `side` pixels; ties are no hits.
    """
    a, b = (F.interpolate(luminance(part), (side, side), mode="area").flatten(1) for part in (results, truth))
    a, b = (F.normalize(grey - grey.mean(1, keepdim=True), dim=1, eps=1e-4) for grey in (a, b))
    likeness = a @ b.T
    own = likeness.diagonal()
    return (likeness >= own[:, None] - 1e-6).sum(1) == 1


#################################################################################
#                                     Style                                     #
#################################################################################


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
        # NHWC, in which its convolutions take little more than half of the time on a CPU.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks memory_format

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_styles)."""
        return self.head(self.features(pixels.contiguous(memory_format=torch.channels_last)).mean((2, 3)))

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
    largest: int = 96,
) -> StyleClassifier:
    """Train on random mirrored crops, each style drawn equally often; deterministic on a CPU.

    Crops are of 7/8 of the side, but of no more than `largest` pixels: a style shows in its texture, and time has an
    end.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StyleClassifier(num_styles)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    weights = 1.0 / styles.bincount(minlength=num_styles)[styles].double()
    crop = min(largest, pixels.shape[-1] * 7 // 8)
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


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 128, patches: int = 8192, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of 7 x 7 colour patches, the mean over scales 1, 1/2 and 1/4 (where a patch fits).

    Rabin et al., "Wasserstein barycenter and its application to texture mixing", 2011; patches as in Karras et al.,
    arXiv:1710.10196, but not normalised, since colour is part of a style. In units of pixels in [-1, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    distances = []
    smallest = min(*a.shape[2:], *b.shape[2:])
    for scale in (scale for scale in (1, 2, 4) if smallest // scale >= 7):
        small = [F.avg_pool2d(pixels, scale) for pixels in (a, b)]
        count = min(patches, *(len(part) * (part.shape[2] - 6) * (part.shape[3] - 6) for part in small))
        # Places of their own: in sets of one size, the same ones would find pairs of pictures closer than sets.
        sets = [_random_patches(part, count, seed + number) for number, part in enumerate(small)]
        directions = F.normalize(torch.randn(sets[0].shape[1], projections, generator=generator), dim=0)
        ordered = [(points @ directions).sort(0).values for points in sets]
        distances.append((ordered[0] - ordered[1]).square().mean().sqrt().item())
    return sum(distances) / len(distances)


def _random_patches(pixels: Tensor, count: int, seed: int) -> Tensor:
    """(count, 147) patches of 7 x 7 pixels, drawn without repetition."""
    height, width = pixels.shape[2] - 6, pixels.shape[3] - 6
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pixels) * height * width, generator=generator)[:count]
    picture, place = chosen // (height * width), chosen % (height * width)
    rows = (place // width)[:, None] + torch.arange(7)  # (count, 7)
    columns = (place % width)[:, None] + torch.arange(7)
    return pixels[picture[:, None, None], :, rows[:, :, None], columns[:, None, :]].flatten(1)


def to_lab(pixels: Tensor) -> Tensor:
    """sRGB in [-1, 1] (B, 3, H, W) -> CIE L*a*b*, white point D65: L from 0 to 100."""
    rgb = (pixels.clamp(-1, 1) + 1) / 2
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(  # IEC 61966-2-1
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], device=pixels.device
    )
    xyz = torch.einsum("kc,bchw->bkhw", matrix / matrix.sum(1, keepdim=True), linear)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-9) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def lab_distance(a: Tensor, b: Tensor, points: int = 1024) -> float:
    """1-Wasserstein distance between the histograms of L*, a* and b* over all pixels, the mean of the three."""
    levels = (torch.arange(points) + 0.5) / points
    quantiles = [
        torch.stack([_quantiles(channel, levels) for channel in to_lab(pixels).transpose(0, 1).flatten(1)])
        for pixels in (a, b)
    ]
    return (quantiles[0] - quantiles[1]).abs().mean().item()


def _quantiles(values: Tensor, levels: Tensor) -> Tensor:
    ordered = values.sort().values  # torch.quantile refuses more than 2^24 values
    return ordered[(levels * len(ordered)).long()]


#################################################################################
#                                 Distributions                                 #
#################################################################################


def latent_features(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 2 C): mean and deviation of each channel, what a Frechet or kernel distance compares."""
    return torch.cat([latents.mean((2, 3)), latents.std((2, 3), correction=0)], 1).double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2) of two sets of features (N, d): the distance of Heusel et al.

    arXiv:1706.08500, eq. 6. On `latent_features` it is named FLD: it is no FID, whose features are Inception's.
    """
    means, covariances = zip(*((features.mean(0), torch.cov(features.T)) for features in (a, b)), strict=True)
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * middle
    return ((means[0] - means[1]).square().sum() + spread.clamp_min(0)).item()  # rounding can make equal sets less


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of features (N, d) under the kernel (x.y / d + 1)^3: Binkowski et al., arXiv:1801.01401."""
    return kernel_estimate(a, b).mean


def kernel_estimate(a: Tensor, b: Tensor, most: int = 2048) -> Estimate:
    """The kernel distance of features (N, d) and its interval; on `latent_features`: KLD. Of at most `most` rows a set.

    The interval is 1.96 jackknife deviations either way (Efron & Stein, Ann. Statist. 9(3), 1981): the distance anew
    without each row in turn. Below three rows a set there is none, and its ends are NaN.
    """
    a, b = (rows[:: math.ceil(len(rows) / most)].double() for rows in (a, b))
    n, m = len(a), len(b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    inside_a, inside_b = ((k := kernel(x, x)) - k.diagonal().diag_embed() for x in (a, b))
    across = kernel(a, b)
    within_a, within_b = inside_a.sum() / (n * (n - 1)), inside_b.sum() / (m * (m - 1))
    distance = (within_a + within_b - 2 * across.mean()).item()
    if min(n, m) < 3:
        return Estimate(distance, math.nan, math.nan)
    less_a = (inside_a.sum() - 2 * inside_a.sum(1)) / ((n - 1) * (n - 2)) + within_b
    less_a -= 2 * (across.sum() - across.sum(1)) / ((n - 1) * m)
    less_b = (inside_b.sum() - 2 * inside_b.sum(1)) / ((m - 1) * (m - 2)) + within_a
    less_b -= 2 * (across.sum() - across.sum(0)) / ((m - 1) * n)
    variance = sum((len(less) - 1) * less.var(correction=0).item() for less in (less_a, less_b))
    return Estimate(distance, distance - 1.96 * variance**0.5, distance + 1.96 * variance**0.5)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) root-mean-square distances of all rows (N, d) and (M, d); equal rows are at 0.

    Above 25 rows cdist's own choice is |x|^2 + |y|^2 - 2 x y, whose rounding sets copies apart.
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / a.shape[1] ** 0.5


def nearest_distance(queries: Tensor, among: Tensor) -> Tensor:
    """(N,) root-mean-square distance of each query to its nearest neighbour; both (.., C, h, w)."""
    return distances(queries.flatten(1), among.flatten(1)).amin(1)


def probe_accuracy(
    features: Tensor,  # (N, d)
    labels: Tensor,  # (N,) int64
    groups: Tensor | None = None,  # (N,) int64: samples of one group are of one picture; None: no two are
    folds: int = 5,
    seed: int = 0,
) -> Tensor:
    """(N,) bool: does a linear probe, trained on the other folds, tell each sample's label?

    Ridge regression on one-hot labels over standardised features, its penalty chosen inside each training part. A
    group lies in one fold: a probe that has seen a picture in one style would else tell its others by their content,
    and name the style that they are not of.
    """
    groups = torch.arange(len(labels)) if groups is None else groups.unique(return_inverse=True)[1]
    count = int(groups.max()) + 1
    label_of = torch.zeros(count, dtype=labels.dtype).scatter(0, groups, labels)  # any one of a group's
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    order = shuffled[label_of[shuffled].argsort(stable=True)]  # dealt out in turn, so every fold has each label's share
    penalties = [0.1, 1.0, 10.0, 100.0, 1000.0]
    correct = torch.zeros(len(labels), dtype=torch.bool)
    samples = [(groups == group).nonzero().flatten() for group in order]
    for fold in range(folds):
        test = [sample for number, sample in enumerate(samples) if number % folds == fold]
        train = [sample for number, sample in enumerate(samples) if number % folds != fold]
        if not test:
            continue
        inner = torch.cat(train[::4]), torch.cat(train[1::4] + train[2::4] + train[3::4])
        scores = [_ridge_hits(features, labels, inner[1], inner[0], penalty).double().mean() for penalty in penalties]
        best = penalties[int(torch.stack(scores).argmax())]
        correct[torch.cat(test)] = _ridge_hits(features, labels, torch.cat(train), torch.cat(test), best)
    return correct


def _ridge_hits(features: Tensor, labels: Tensor, train: Tensor, test: Tensor, penalty: float) -> Tensor:
    x = features.double()
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-8)
    targets = F.one_hot(labels, int(labels.max()) + 1).double()
    offset = targets[train].mean(0)
    gram = x[train] @ x[train].T + penalty * torch.eye(len(train), dtype=torch.float64)  # dual: d may exceed N
    weights = x[train].T @ torch.linalg.solve(gram, targets[train] - offset)
    return (x[test] @ weights + offset).argmax(1) == labels[test]
