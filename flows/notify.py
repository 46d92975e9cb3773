"""Tell people, wherever they are: the addresses in NBS_NOTIFY, as github.com/caronc/apprise writes them, separated by spaces."""
import os


def notify(title: str, # what happened
           body: str,  # one line or more
           bad: bool   # it needs somebody
          ):
    "Send a message. What could not be told is in the log, and does not stop what was done."
    import apprise
    told = apprise.Apprise(os.environ.get("NBS_NOTIFY", "").split(), asset=apprise.AppriseAsset(app_id="nbs", app_desc="retraining"))
    if told: told.notify(title=title, body=body, notify_type=apprise.NotifyType.WARNING if bad else apprise.NotifyType.SUCCESS)
