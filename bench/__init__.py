import os

# Must come before torch is loaded. PyTorch's threads spin while they wait for each other; where another program wants the
# same cores, small models then run up to fifty times slower. Asleep, they lose next to nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
