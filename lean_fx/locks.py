"""The lock for code that changes state that all threads share."""

import threading

#: torch.fx and torch's exporter patch nn.Module while they trace, and random numbers come from one
#: generator. Code that traces, exports or draws holds this lock; it is reentrant.
SHARED_STATE = threading.RLock()
