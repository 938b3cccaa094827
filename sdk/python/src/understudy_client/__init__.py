"""Tell an Understudy gateway what people did with its answers."""

from understudy_client._feedback import Answer, AsyncFeedback, Feedback, More
from understudy_client._wrap import wrap

__all__ = ["Answer", "AsyncFeedback", "Feedback", "More", "wrap"]
__version__ = "0.1.0"
