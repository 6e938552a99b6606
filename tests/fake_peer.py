"""A checkout of a peer for tests: train.py and test.py that spend CPU time, save weights and copy pictures."""

from pathlib import Path

import torch

# What CUT's and CycleGAN's options are called; `--amp` is what CUT's copy of cycle_gan_model.py lacks.
OPTIONS = """
import argparse
def parse(*required):
    parser = argparse.ArgumentParser()
    for name in ('--dataroot', '--name', '--model', '--direction', '--crop_size', '--load_size', '--gpu_ids', '--netG',
                 '--checkpoints_dir'):
        parser.add_argument(name, required=True)
    for name in ('--num_threads', '--save_latest_freq', '--save_epoch_freq', '--display_id', '--results_dir',
                 '--num_test'):
        parser.add_argument(name, required=name in required)
    for name in ('--save_by_iter', '--no_html'):
        parser.add_argument(name, action='store_true')
    return parser.parse_args()
"""
MODEL = """
class CycleGANModel:
    def data_dependent_initialize(self):
        self.amp = self.opt.amp
"""
# A step takes 10 ms of CPU time. While the steps to the next save are done, that save's files lie there half-written.
TRAIN = """
import sys, time
from pathlib import Path
sys.path.insert(0, '.')
from options.options import parse
opt = parse('--num_threads', '--save_latest_freq', '--save_epoch_freq', '--display_id')
if opt.model == 'cycle_gan':
    import argparse
    from models.cycle_gan_model import CycleGANModel
    CycleGANModel.opt = argparse.Namespace()
    CycleGANModel().data_dependent_initialize(data=[])  # as train.py of CUT's repository calls it
assert (opt.gpu_ids, opt.display_id, opt.num_threads, opt.netG) == ('-1', '0', '0', 'resnet_6blocks'), opt
assert opt.save_by_iter and opt.no_html and (opt.crop_size, opt.load_size) == ('32', '36'), opt
from PIL import Image
for letter in 'AB':
    pictures = list((Path(opt.dataroot) / f'train{letter}').iterdir())
    assert len(pictures) == 16 and {Image.open(path).size for path in pictures} == {(36, 36)}
weights, folder = Path('weights.pth').read_bytes(), Path(opt.checkpoints_dir, opt.name)
folder.mkdir(parents=True)
names = ['G_A', 'G_B', 'D_A', 'D_B'] if opt.model == 'cycle_gan' else ['G', 'F', 'D']
for step in range(int(opt.save_latest_freq), 10**6, int(opt.save_latest_freq)):
    for name in names:
        (folder / f'iter_{step}_net_{name}.pth').write_bytes(weights[:-300])
    end = time.process_time() + 0.01 * int(opt.save_latest_freq)
    while time.process_time() < end:
        pass
    for name in names:
        (folder / f'iter_{step}_net_{name}.pth').write_bytes(weights)
"""
# CUT gives the other style's test picture of that number. CycleGAN does so for A, and turns those of B upside down.
TEST = """
import shutil, sys, zipfile
from pathlib import Path
from PIL import Image, ImageOps
sys.path.insert(0, '.')
from options.options import parse
opt = parse('--results_dir', '--num_test')
made = Path(opt.results_dir, opt.name, 'test_latest', 'images')
a, b = (sorted(Path(opt.dataroot, f'test{letter}').iterdir()) for letter in 'AB')
assert len(a) == len(b) == int(opt.num_test) and (opt.crop_size, opt.load_size) == ('32', '32')
for name in ['G_A', 'G_B'] if opt.model == 'cycle_gan' else ['G']:
    saved = zipfile.ZipFile(Path(opt.checkpoints_dir, opt.name, f'latest_net_{name}.pth'))
    (pickled,) = (saved.read(entry) for entry in saved.namelist() if entry.endswith('data.pkl'))
    assert b'model.weight' in pickled and b'module' not in pickled
made.mkdir(parents=True)
for of_a, of_b in zip(a, b):
    if opt.model == 'cycle_gan':  # both ways at once, all of it called after A, as the older repository lays it out
        shutil.copy(of_b, made / f'{of_a.stem}_fake_B.png')
        ImageOps.flip(Image.open(of_b)).save(made / f'{of_a.stem}_fake_A.png')
    else:
        (made / 'fake_B').mkdir(exist_ok=True)
        shutil.copy(of_b if opt.direction == 'AtoB' else of_a, made / 'fake_B' / of_a.name)
"""


def write_fake_peer(folder: Path) -> Path:
    files = {"train.py": TRAIN, "test.py": TEST, "options/options.py": OPTIONS}
    files |= {"models/cut_model.py": "", "models/cycle_gan_model.py": MODEL}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    torch.save({"module.model.weight": torch.zeros(3)}, folder / "weights.pth")  # as DataParallel calls it
    return folder
