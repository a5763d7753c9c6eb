"""How the processes of one run find each other, watch each other, and stop together.

JAX's coordination service lives in process 0; every process is its client. All that is ours goes through its key-value
store: names, signs of life, why a process failed, when to stop.

The service has an answer of its own to a process that died: it aborts all the others (LOG(FATAL), exit code 134) with a
page of C++. Two things keep it from coming before ours. Its heartbeats have a limit far longer than ours. And a client,
which aborts at once when its connection breaks, that is when process 0 dies, is not connected to process 0 but to a
relay in its own process, which keeps the client's side open when the other side is gone.
"""

from ctx_jax.hosts.join import Hosts as Hosts
from ctx_jax.hosts.join import joined as joined
from ctx_jax.hosts.team import Team as Team
from ctx_jax.hosts.team import on_first_process as on_first_process
from ctx_jax.hosts.team import wait_for_all as wait_for_all
