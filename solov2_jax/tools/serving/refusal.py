"""What the service answers when it does not predict."""


class RequestRefused(Exception):
    """A request that is answered with an error.

    Args:
      status: of HTTP.
      message: for the client: what is wrong and what to do.
      retry_after: seconds, where trying again makes sense.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after
