"""Tell people, wherever they are: the addresses in NBS_NOTIFY, as github.com/caronc/apprise writes them, separated by spaces."""
import os


def notify(title: str, # what happened
           body: str,  # one line or more
           bad: bool   # it needs somebody
          ) -> bool:   # whether every address took it; true where there is none
    "Send a message. Never raises: what could not be told shall not stop what was done."
    import apprise
    addresses = os.environ.get("NBS_NOTIFY", "").split()
    told = apprise.Apprise(asset=apprise.AppriseAsset(app_id="nbs", app_desc="retraining"))
    known = [told.add(address) for address in addresses]
    kind = apprise.NotifyType.WARNING if bad else apprise.NotifyType.SUCCESS
    return all(known) and (not addresses or bool(told.notify(title=title, body=body, notify_type=kind)))
