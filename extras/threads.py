"""How PyTorch's threads wait for one another; to be imported before torch.

GNU OpenMP, which PyTorch brings on Linux, lets them spin for milliseconds at every wait. Where another program wants one of the cores, the
one that is waited for doesn't run, and small models become many times slower. Threads that sleep at once lose next to nothing there,
but time to wake up at every kernel on an idle machine. So they spin for about as long as a small kernel takes, then sleep.
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="5000")
