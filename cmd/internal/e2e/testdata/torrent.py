"""A BitTorrent program on libtorrent, for swarm_test.go. Its only argument is JSON: settings of the session, and
with "torrent" and "data" a file to seed, or with "peer", [address, port], to get from that peer. It prints a line for each event that a test waits for, and runs until it is killed."""

import json
import sys

import libtorrent as lt

config = json.loads(sys.argv[1])
settings = {
    "enable_lsd": False,
    "enable_natpmp": False,
    "enable_upnp": False,
    "enable_dht": False,
    "dht_bootstrap_nodes": "",
    # The addresses are those for documentation, few, and near each other.
    "dht_restrict_routing_ips": False,
    "dht_restrict_search_ips": False,
    "dht_ignore_dark_internet": False,
    "alert_mask": lt.alert.category_t.all_categories,
}
settings.update(config["settings"])
session = lt.session(settings)


def add_torrent():
    params = lt.add_torrent_params()
    params.ti = lt.torrent_info(config["torrent"])
    params.save_path = config["data"]
    if "peer" in config:
        params.flags |= lt.torrent_flags.override_trackers
        params.trackers = []
        session.add_torrent(params).connect_peer(tuple(config["peer"]))
    else:
        params.flags |= lt.torrent_flags.seed_mode
        session.add_torrent(params)


# It announces the port that it knows by then, and another one only half an hour later: so it learns it from its gateway first.
waiting = settings["enable_natpmp"] or settings["enable_upnp"]
if "torrent" in config and not waiting:
    add_torrent()

shown = (lt.listen_succeeded_alert, lt.listen_failed_alert, lt.portmap_alert, lt.portmap_error_alert, lt.tracker_announce_alert,
         lt.tracker_reply_alert, lt.tracker_error_alert, lt.dht_bootstrap_alert, lt.dht_reply_alert,
         lt.incoming_connection_alert, lt.peer_connect_alert, lt.peer_disconnected_alert,
         lt.torrent_finished_alert)
while True:
    session.wait_for_alert(1000)
    for alert in session.pop_alerts():
        if isinstance(alert, lt.dht_announce_alert):  # another node announces itself to this one
            print("announced", alert.ip, alert.port, alert.info_hash, flush=True)
        elif isinstance(alert, shown):
            print(alert.what(), alert.message(), flush=True)
        if waiting and isinstance(alert, lt.portmap_alert) and "TCP/" in alert.message():
            waiting = False
            add_torrent()
