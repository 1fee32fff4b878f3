"""POST …/notify: parses the request, delivers, replies."""

from flask import Blueprint, Response

from notifier.errors import DeliveryFailed, InvalidRequest
from notifier.logs import mask_address
from notifier.models import ChannelOutcome, Recipient
from notifier.web.body import read_message
from notifier.web.requests import current_request, notifier

_DELIVERED = b'{"message":"notification sent successfully"}\n'

blueprint = Blueprint("notify", __name__, url_prefix="/api/v1.0")


@blueprint.post("/recipient/<recipient>/notify", provide_automatic_options=False)
def notify(recipient: str) -> Response:
    """Deliver one notification; reply 200 only if every channel delivered."""
    to, current = _parse_recipient(recipient), current_request()
    current.log_fields["recipient"] = to
    message = read_message()
    current.log_fields["to"] = mask_address(message.to)
    current.turn.wait()
    try:
        report = notifier().notify(to, message, current.turn.arrival)
    finally:
        current.turn.resume()
    current.log_fields["channels"] = report.log_fields()
    if report.outcome is not ChannelOutcome.DELIVERED:
        raise DeliveryFailed
    return Response(_DELIVERED, content_type="application/json")


def _parse_recipient(text: str) -> Recipient:
    try:
        return Recipient(text)
    except ValueError:
        raise InvalidRequest(f"recipient: must be one of {', '.join(Recipient)}") from None
