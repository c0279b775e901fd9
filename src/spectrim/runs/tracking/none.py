"""No tracking."""

from spectrim.runs.tracking.session import About, Session
from spectrim.tools.settings import settings


@settings
class NoTracking:
    """No tracking. It needs no package and no network."""

    def start(self, about: About) -> Session | None:
        """Return None: nobody is told."""
        return None
