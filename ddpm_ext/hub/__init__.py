"""Files between this machine and the Hub: retried, checked, told in sentences."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from ..errors import HubError
    from .retry import RetryPolicy
    from .upload import push_to_hub

__all__ = ["HubError", "RetryPolicy", "push_to_hub"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "retry": (
            "HubError",
            "RetryPolicy",
        ),
        "upload": ("push_to_hub",),
    },
)
