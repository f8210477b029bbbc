package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

// This file is about real programs as seeders that map their port in all the ways they know; see TestSwarm for one way each.

// upnpAlone returns flags for `run` with which the program's questions by NAT-PMP and PCP get no answer.
func (s *swarm) upnpAlone() (flags []string) {
	s.t.Helper()
	needPrograms(s.t, "nft")
	needNamed(s.t, "igd")
	if out, err := exec.Command("ip", "netns", "exec", "igd", "nft", "add table inet igd;"+
		"add chain inet igd out { type filter hook output priority 0; };"+
		"add rule inet igd out udp dport 5351 drop").CombinedOutput(); err != nil {
		s.t.Fatalf("nft: %v: %s", err, out)
	}
	return []string{"--netns", "igd"}
}

// qbittorrent returns the command of a qBittorrent that maps its port by UPnP and NAT-PMP, and seeds what a second one with the
// same command and a torrent hands over to it. It asks nobody but its gateway and its tracker for anything.
func (s *swarm) qbittorrent(port uint16) (program []string) {
	s.t.Helper()
	needPrograms(s.t, "qbittorrent-nox")
	s.write(filepath.Join(s.sub("home/qBittorrent/config"), "qBittorrent.conf"), fmt.Sprintf(`[LegalNotice]
Accepted=true

[BitTorrent]
Session\Port=%d
Session\DHTEnabled=false
Session\LSDEnabled=false
Session\PeXEnabled=false

[Network]
PortForwardingEnabled=true

[Preferences]
Connection\ResolvePeerCountries=false
`, port))
	home := s.sub("home")
	return []string{"env", "HOME=" + home, "qbittorrent-nox", "--profile=" + home, "--save-path=" + s.data}
}

// qbittorrentLog returns the log of qBittorrent, which is not in its output.
func (s *swarm) qbittorrentLog() string {
	b, err := os.ReadFile(filepath.Join(s.dir, "home/qBittorrent/data/logs/qbittorrent.log"))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// TestSwarmQBittorrent: a real qBittorrent maps its port by NAT-PMP, though UPnP refuses it, or by UPnP alone. It announces the
// port that dante has given, which is another one than its own, and serves the whole file to a peer that comes from outside.
// Nothing else of it is open, its web interface neither.
func TestSwarmQBittorrent(t *testing.T) {
	t.Parallel()
	for name, way := range map[string]string{"all ways": "NAT-PMP", "UPnP alone": "UPnP"} {
		t.Run(name, func(t *testing.T) {
			if apart(t) {
				inSwarm(t, "run", "http", func(s *swarm) { s.seedByQBittorrent(way) })
			}
		})
	}
}

// seedByQBittorrent lets qBittorrent map its port by this way, and serve the file.
func (s *swarm) seedByQBittorrent(way string) {
	t, flags := s.t, []string{"--proxy", swarmProxy(s.t), "--listen", "auto"}
	if way == "UPnP" {
		flags = append(flags, s.upnpAlone()...)
	}
	_, own := listenTCP(t, world4) // so that dante gives another port
	program := s.qbittorrent(own.Port())
	p := s.behind(flags, program...)
	defer func() {
		if t.Failed() {
			t.Log(s.qbittorrentLog())
		}
	}()
	// As with Transmission, a port that it learns later is not announced.
	mapped := regexp.MustCompile("successfully mapped port using " + way + "[^\n]*TCP/")
	if !s.until(func() bool { return mapped.MatchString(s.qbittorrentLog()) }) {
		t.Fatalf("it maps no port by %s", way)
	}
	ctx, cancel := context.WithTimeout(t.Context(), testkit.Patience)
	defer cancel()
	if out, err := exec.CommandContext(ctx, program[0], append(program[1:], s.torrent)...).CombinedOutput(); err != nil {
		s.checkPrograms()
		t.Fatalf("it takes no torrent: %v: %s", err, out)
	}
	if outer := s.await(p); outer.Port() == own.Port() {
		t.Errorf("dante has given %v, which is taken", outer)
	}
	p.servedAll()
	for _, open := range p.status().Listening.Ports {
		if open.Port != own.Port() {
			t.Errorf("port %d is open, too", open.Port)
		}
	}
}

// TestSwarmTransmissionUPnP: a real Transmission maps its port by UPnP alone, and serves the whole file to a peer that comes from
// outside. It insists on its own number, which is free at dante.
func TestSwarmTransmissionUPnP(t *testing.T) {
	if !apart(t) {
		return
	}
	s, url := newSwarm(t, "http"), swarmProxy(t)
	port := freePort(t)
	p := s.behind(append(s.upnpAlone(), "--proxy", url, "--listen", "auto",
		// Its UPnP does not take a gateway whose outer address is one for documentation. Only the text is used.
		"--forwarded-port", "192.0.1.1:9/udp"), s.transmission(port)...)
	p.says("Port forwarding successful!")
	b, err := os.ReadFile(s.torrent)
	if err != nil {
		t.Fatal(err)
	}
	s.write(filepath.Join(s.sub("watch"), "it.torrent"), string(b))
	if outer, want := s.await(p), fmt.Sprintf("%s:%d", world4, port); outer.String() != want {
		t.Errorf("peers reach the seeder at %v, want %s", outer, want)
	}
	p.servedAll()
}
