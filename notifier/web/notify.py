"""What the API promises: the one endpoint and its reply."""

from flask import Blueprint, Response, current_app, g, jsonify

from notifier.errors import DeliveryFailed, InvalidRequest
from notifier.logs import mask_address
from notifier.models import Recipient
from notifier.web.body import read_message

blueprint = Blueprint("notify", __name__, url_prefix="/api/v1.0")


@blueprint.post("/recipient/<recipient>/notify", provide_automatic_options=False)
def notify(recipient: str) -> Response:
    """Deliver one notification, and say so only when every channel of the recipient has."""
    to = _parse_recipient(recipient)
    g.log_fields = {"recipient": to}
    notifier = current_app.extensions["notifier"]
    with notifier.capacity:
        message = read_message()
        deadline = g.began + notifier.settings.notify_deadline
        report = notifier.delivery.deliver(to, message, deadline)
    g.log_fields |= {
        "to": mask_address(message.to),
        "channels": [result._asdict() for result in report.channels],
    }
    if report.outcome != "delivered":
        raise DeliveryFailed
    return jsonify(message="notification sent successfully")


def _parse_recipient(text: str) -> Recipient:
    try:
        return Recipient(text)
    except ValueError:
        raise InvalidRequest(f"recipient: must be one of {', '.join(Recipient)}") from None
