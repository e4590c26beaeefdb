"""From a model to pictures, with nothing hidden: a schedule and a method make a table, and the table is run.

python examples/sample.py [--steps 50] [--eta 0.0] [-o digits.png]
"""

import argparse

from fastddpm import Sampler, load_pretrained
from fastddpm.common.images import save_grid
from fastddpm.process.tables import ddim_table

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--eta", type=float, default=0.0, help="0: no noise in the steps; 1: as much as DDPM")
parser.add_argument("-o", "--output", default="digits.png")
args = parser.parse_args()

# A U-Net, and the forward process it was trained on: 1,000 levels of noise. The bundled one predicts v.
digits = load_pretrained()
unet, schedule = digits.unet, digits.schedule

# A method is a function that returns a table: a row of coefficients for each timestep that is visited.
timesteps = schedule.timesteps(args.steps, "trailing")
table = ddim_table(schedule, timesteps, prediction_type="v_prediction", eta=args.eta)
print(f"{len(table)} steps; the first row [A B C D E F S] is {[round(value, 4) for value in table.rows[0].tolist()]}")

# Sample k of a seed is the same image whatever the batch size, the device or the number of samples.
sampler = Sampler(unet, table)
images = sampler.sample(20, seed=0, class_labels=[k % 10 for k in range(20)])  # float32 [20, 1, 16, 16] in [-1, 1]
save_grid(args.output, images)
print(f"wrote {args.output}")
