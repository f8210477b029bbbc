package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// swarmProxy starts dante, which lets peers in at world4 and lets nobody connect to other4, the address of the leechers.
func swarmProxy(t *testing.T) (url string) {
	needPrograms(t, "danted")
	dante(t, "127.0.0.1:1086", "socks block { from: 0/0 to: "+other4+"/32 command: connect }")
	return "socks5://127.0.0.1:1086"
}

// systemPython is Debian's, for which Debian's modules are.
const systemPython = "/usr/bin/python3"

// settings are those of libtorrent.
type settings = map[string]any

// libtorrent returns the command of a program on libtorrent-rasterbar; see testdata/torrent.py.
func (s *swarm) libtorrent(config map[string]any) (program []string) {
	s.t.Helper()
	if err := exec.Command(systemPython, "-c", "import libtorrent").Run(); err != nil {
		s.t.Skip("python3-libtorrent is not installed (scripts/deps.sh)")
	}
	b, err := json.Marshal(config)
	if err != nil {
		s.t.Fatal(err)
	}
	return []string{systemPython, filepath.Join("testdata", "torrent.py"), string(b)}
}

// seeding returns the command of a libtorrent that seeds.
func (s *swarm) seeding(with settings) (program []string) {
	s.t.Helper()
	return s.libtorrent(map[string]any{"settings": with, "torrent": s.torrent, "data": s.data})
}

// transmission returns the command of a Transmission that asks for its port by NAT-PMP, and seeds from addTorrent on.
func (s *swarm) transmission(port uint16) (program []string) {
	s.t.Helper()
	needPrograms(s.t, "transmission-daemon")
	config, watch := s.sub("config"), s.sub("watch")
	settings, err := json.Marshal(map[string]any{
		"port-forwarding-enabled": true, "peer-port": port, "dht-enabled": false, "utp-enabled": false, "lpd-enabled": false,
		"pex-enabled": false, "rpc-enabled": false, "watch-dir": watch, "watch-dir-enabled": true,
		"download-dir": s.data, "incomplete-dir-enabled": false, "message-level": 3,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.write(filepath.Join(config, "settings.json"), string(settings))
	return []string{"transmission-daemon", "--foreground", "--config-dir", config}
}

// addTorrent gives Transmission the torrent once it knows its port: it announces its own port until then, and tells trackers of
// another one only when it announces next, in half an hour.
func (s *swarm) addTorrent(p *swarmer) {
	s.t.Helper()
	b, err := os.ReadFile(s.torrent)
	if err != nil {
		s.t.Fatal(err)
	}
	p.says("forwarded successfully")
	s.write(filepath.Join(s.sub("watch"), "it.torrent"), string(b))
}

// TestSwarm: seeders behind viasocks map their port by NAT-PMP or UPnP and announce to opentracker, by HTTP and UDP, the port
// that dante has given, which is another one than their own. A leecher to which nobody can connect downloads the whole file.
func TestSwarm(t *testing.T) {
	for _, c := range []struct {
		name, tracker string
		program       func(s *swarm, port uint16) []string
		then          func(*swarm, *swarmer)
	}{
		{"transmission", "http", (*swarm).transmission, (*swarm).addTorrent},
		{"libtorrent-natpmp", "udp", func(s *swarm, port uint16) []string {
			return s.seeding(settings{"enable_natpmp": true, "listen_interfaces": fmt.Sprint("0.0.0.0:", port)})
		}, nil},
		{"libtorrent-upnp", "http", func(s *swarm, port uint16) []string {
			return s.seeding(settings{"enable_upnp": true, "listen_interfaces": fmt.Sprint("0.0.0.0:", port)})
		}, nil},
	} {
		inSwarm(t, c.name, c.tracker, func(s *swarm) {
			t, url := s.t, swarmProxy(s.t)
			_, own := listenTCP(t, world4) // so that dante gives another port
			p := s.behind([]string{"--proxy", url, "--listen", "auto"}, c.program(s, own.Port())...)
			if c.then != nil {
				c.then(s, p)
			}
			if outer := s.await(p); outer.Port() == own.Port() {
				t.Errorf("dante has given %v, which is taken", outer)
			}
			p.servedAll()
		})
	}
}

// TestSwarmSamePort: aria2 asks no gateway and announces its own port, to a tracker and in the DHT. With the same number for
// --listen, dante listens at that port, too.
func TestSwarmSamePort(t *testing.T) { inSwarm(t, "aria2", "http", testSwarmSamePort) }

func testSwarmSamePort(s *swarm) {
	t, url := s.t, swarmProxy(s.t)
	port := fmt.Sprint(freePort(t))
	node, entry := s.dhtNode()
	p := s.behind([]string{"--proxy", url, "--listen", port}, "aria2c", "--no-conf", "--dir="+s.data, "--listen-port="+port,
		"--check-integrity=true", "--seed-ratio=0", "--enable-dht=true", "--dht-listen-port="+port, "--dht-entry-point="+entry,
		"--dht-file-path="+filepath.Join(s.dir, "dht"), "--bt-enable-lpd=false", "--enable-peer-exchange=false", s.torrent)
	if outer, want := s.await(p), world4+":"+port; outer.String() != want {
		t.Errorf("peers reach the seeder at %v, want %s", outer, want)
	}
	if got, want := node.says("announced "), fmt.Sprintf("%s %s %x", world4, port, s.hash); got != want {
		t.Errorf("in the DHT it announces %s, want %s", got, want)
	}
	p.servedAll()
}

// dhtNode starts a DHT node that says who announces itself to it.
func (s *swarm) dhtNode() (node *swarmer, at string) {
	s.t.Helper()
	node = s.start(s.libtorrent(map[string]any{"settings": settings{"enable_dht": true, "listen_interfaces": other4 + ":0"}})...)
	return node, strings.TrimSpace(node.says("successfully listening on [uTP] "))
}

// TestSwarmDHT: what libtorrent announces in the DHT. Without uTP it is its own port (or one for UDP that its gateway has named),
// which is right if dante has given the same. With uTP it is the port from which its datagrams come (implied_port, BEP 5), where
// it is reached by uTP.
func TestSwarmDHT(t *testing.T) {
	for name, utp := range map[string]bool{"tcp": false, "utp": true} {
		inSwarm(t, name, "http", func(s *swarm) {
			t, url := s.t, swarmProxy(s.t)
			node, entry := s.dhtNode()
			port := freePort(t)
			with := settings{"listen_interfaces": fmt.Sprint("0.0.0.0:", port), "enable_dht": true,
				"dht_bootstrap_nodes": entry, "enable_incoming_utp": utp}
			p := s.behind([]string{"--proxy", url, "--listen", fmt.Sprint(port)}, s.seeding(with)...)
			outer := p.outer()
			got := strings.Fields(node.says("announced "))
			if len(got) != 3 || got[0] != world4 || got[2] != fmt.Sprintf("%x", s.hash) {
				t.Fatalf("it announces %q", got)
			}
			if !utp {
				if got[1] != strconv.Itoa(int(outer.Port())) {
					t.Errorf("it announces port %s, want that of %v", got[1], outer)
				}
				return
			}
			s.leechByUTP(netip.MustParseAddrPort(got[0] + ":" + got[1]))
		})
	}
}

// leechByUTP downloads the file from the peer at an endpoint by uTP.
func (s *swarm) leechByUTP(from netip.AddrPort) {
	s.t.Helper()
	dir := s.sub("utp")
	p := s.start(s.libtorrent(map[string]any{"torrent": s.torrent, "data": dir, "peer": []any{from.Addr(), from.Port()},
		"settings": settings{"enable_outgoing_tcp": false, "listen_interfaces": other4 + ":0"}})...)
	p.says("torrent_finished")
	s.checkFile(dir)
}
