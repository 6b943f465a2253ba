"""The lock of whatever changes state that all threads share."""

import threading

#: torch.fx patches nn.Module while it traces, torch's exporter does so too, and random numbers are
#: drawn from one generator. Who does one of these holds this lock; a thread may take it again.
SHARED_STATE = threading.RLock()
