"""MixUp in a plain training loop: a small network learns handwritten digits.

python examples/quickstart.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from mixup_nn import MixUp, MixUpCriterion

torch.manual_seed(0)

# 1,797 pictures of 8x8 pixels: 1,000 to train, the others to test.
images, digits = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(digits)
train, test = torch.randperm(len(x)).split((1000, 797))

# MixUp is the first layer. In eval mode it does nothing.
mixup = MixUp(alpha=1.0)
network = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)]
model = nn.Sequential(mixup, *network)

# The criterion follows mixup: it mixes the targets as mixup mixed the inputs. In eval mode it is the plain loss.
criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixup)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

for epoch in range(1, 31):
    model.train()
    for batch in train[torch.randperm(len(train))].split(50):
        loss = criterion(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if epoch % 5 == 0:
        model.eval()
        with torch.no_grad():
            logits = model(x[test])
        accuracy = (logits.argmax(1) == y[test]).float().mean()
        print(f"epoch {epoch}: test loss {criterion(logits, y[test]):.3f}, test accuracy {accuracy:.1%}")
