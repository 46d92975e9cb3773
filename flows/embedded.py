"""Prefect's settings for a workspace on its own: `import flows.embedded` stands before prefect, which reads them once.

Where PREFECT_API_URL or a profile names a server, its database is that server's own matter.
"""
import os

from flows.home import ROOT

FOLDER = ROOT/"data/prefect"
for name, value in dict(PREFECT_SERVER_DATABASE_CONNECTION_URL=f"sqlite+aiosqlite:///{FOLDER/'prefect.db'}",
                        # else a slot that a run held when it was killed together with the server would never be free again
                        PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="prefect.server.concurrency.lease_storage.filesystem",
                        PREFECT_SERVER_ANALYTICS_ENABLED="false", PREFECT_UI_API_URL="/api",
                        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="120").items(): os.environ.setdefault(name, value)
FOLDER.mkdir(parents=True, exist_ok=True)
