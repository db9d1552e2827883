"""How PyTorch's threads wait for one another; to be imported before torch.

GNU OpenMP, which PyTorch brings on Linux, lets them spin for as long as it takes. Where another program wants one of the cores, the one
that is waited for doesn't run, and small models become up to twenty times slower. Asleep they lose next to nothing there, but on an idle
machine half as much again. So they spin for about as long as a kernel takes, then sleep.
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="5000")
