#!/bin/bash
#
# Question: does a client of UPnP map its port if the gateway's own address toward the Internet is a private one?
#
# Why it matters: behind two NATs, or with a proxy in the local network, GetExternalIPAddress names such an address, and a port
# there is of use to the peers of that network. The client maps none, and says that the gateway is not connected, or that UPnP
# should be enabled, though GetStatusInfo says "Connected". Whoever looks for the fault then looks at the gateway.
#
# Seen with: miniupnpc 2.2.4 in its own upnpc and in Transmission 3.00. Explained by: UPNP_GetValidIGD() returns 1 only if
# addr_is_reserved() does not know the address, and else 2, which miniupnpc.h describes as "reported as not connected". The
# networks for documentation count as reserved, too, so that a test with them fails in the same way.

. "$(dirname "$0")/lib.bash"

[[ -x /usr/bin/python3 ]] || cannot "Debian's python3 is not installed"
home_network

debs transmission-daemon=3.00-2.1+deb12u1 libnatpmp1=20150609-7.1+b2 libminiupnpc17=2.2.4-1+b1 libevent-2.1-7=2.1.12-stable-8 \
	miniupnpc=2.2.4-1+b1

# An InternetGatewayDevice:1 that is connected, has the address 10.99.0.1 outside, and writes down what it is asked to do.
cat >"$work/igd.py" <<'PY'
import http.server, re, socket, threading
URN = "urn:schemas-upnp-org:"
def service(kind):
    return (f"<service><serviceType>{URN}service:{kind}:1</serviceType><serviceId>urn:upnp-org:serviceId:{kind}</serviceId>"
        "<SCPDURL>/s.xml</SCPDURL><controlURL>/control</controlURL><eventSubURL>/event</eventSubURL></service>")
def device(kind, *inside):
    services, devices = [x for x in inside if x[:2] == "<s"], [x for x in inside if x[:2] == "<d"]
    return (f"<device><deviceType>{URN}device:{kind}:1</deviceType><UDN>uuid:{kind}</UDN><friendlyName>gateway</friendlyName>"
        f"<serviceList>{''.join(services)}</serviceList><deviceList>{''.join(devices)}</deviceList></device>")
description = (f'<?xml version="1.0"?><root xmlns="{URN}device-1-0"><specVersion><major>1</major><minor>0</minor></specVersion>'
    + device("InternetGatewayDevice", service("Layer3Forwarding"), device("WANDevice", service("WANCommonInterfaceConfig"),
        device("WANConnectionDevice", service("WANIPConnection")))) + "</root>")
answers = {
    "GetStatusInfo": "<NewConnectionStatus>Connected</NewConnectionStatus><NewLastConnectionError>ERROR_NONE"
        "</NewLastConnectionError><NewUptime>3600</NewUptime>",
    "GetExternalIPAddress": "<NewExternalIPAddress>10.99.0.1</NewExternalIPAddress>",
    "AddPortMapping": "",
    "GetSpecificPortMappingEntry": "<NewInternalPort>6882</NewInternalPort><NewInternalClient>10.66.0.2</NewInternalClient>"
        "<NewEnabled>1</NewEnabled><NewPortMappingDescription>x</NewPortMappingDescription>"
        "<NewLeaseDuration>0</NewLeaseDuration>",
}
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass
    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())
    def do_GET(self):
        self.answer(description)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        action = self.headers["SOAPAction"].strip('"').split("#")[1]
        print(action, *re.findall(r"<NewInternalPort>(\d+)<", body), flush=True)
        self.answer('<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
            's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
            f'<u:{action}Response xmlns:u="{URN}service:WANIPConnection:1">{answers[action]}</u:{action}Response>'
            "</s:Body></s:Envelope>")
web = http.server.ThreadingHTTPServer(("10.66.0.1", 5000), Handler)
threading.Thread(target=web.serve_forever, daemon=True).start()
searches = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
searches.bind(("239.255.255.250", 1900))
searches.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
    socket.inet_aton("239.255.255.250") + socket.inet_aton("10.66.0.1"))
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
out.bind(("10.66.0.1", 1900))
print("ready", flush=True)
while True:
    search, peer = searches.recvfrom(2000)
    target = re.search(rb"(?im)^ST: *(\S+)", search)
    if target and target[1] == f"{URN}device:InternetGatewayDevice:1".encode():
        out.sendto(b"HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=1800\r\nEXT:\r\nLOCATION: http://10.66.0.1:5000/d.xml\r\n"
            b"SERVER: Linux/6 UPnP/1.0 gateway/1\r\nST: " + target[1] + b"\r\nUSN: uuid:InternetGatewayDevice::" + target[1]
            + b"\r\n\r\n", peer)
PY
start "$gateway" gateway.log /usr/bin/python3 "$work/igd.py"
within 60 grep -q '^ready' "$work/gateway.log"

# maps PORT tells whether the gateway was asked for it.
maps() { if grep -q "^AddPortMapping $1" "$work/gateway.log"; then echo maps; else echo "maps nothing"; fi; }
# addresses prints how often the gateway was asked for its address.
addresses() { grep -c '^GetExternalIPAddress' "$work/gateway.log"; }

# -i makes upnpc go on: the gateway is in order, and gives the port.
upnpc=$work/root/usr/bin/upnpc
ignoring=$(in_space "$app" "$upnpc" -i -a 10.66.0.2 6882 6882 tcp 2>&1) || cannot "upnpc -i fails: $ignoring"
[[ $(maps 6882) == maps ]] || cannot "upnpc -i maps no port: $ignoring"
plain=$(in_space "$app" "$upnpc" -a 10.66.0.2 6883 6883 tcp 2>&1 || true)
[[ $plain == *"desc: http://10.66.0.1:5000/d.xml"* ]] || cannot "upnpc finds no gateway: $plain"
says="something else"
[[ $plain != *"Found a (not connected?) IGD"* ]] || says="not connected?"

mkdir "$work/config"
cat >"$work/config/settings.json" <<'END'
{ "port-forwarding-enabled": true, "peer-port": 6881, "dht-enabled": false, "lpd-enabled": false, "utp-enabled": false,
  "rpc-enabled": false, "message-level": 3 }
END
before=$(addresses)
start "$app" app.log env HOME="$work" "$work/root/usr/bin/transmission-daemon" --foreground --config-dir "$work/config"
asked() { (($(addresses) > before)); }
within 60 asked
within 60 grep -q '(UPnP)' "$work/app.log"
sleep 10
seen="upnpc: $says, $(maps 6883); Transmission: $(maps 6881)"

report version "miniupnpc 2.2.4-1+b1, transmission-daemon 3.00-2.1+deb12u1"
report expected "both map their port, as the gateway says that it is connected"
report seen "$seen"
conclude "$seen" "upnpc: not connected?, maps nothing; Transmission: maps nothing"
