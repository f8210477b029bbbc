package kernel

import (
	"net"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// TestStrictPathNeighbour: a neighbour in a public network finds this host although the kernel checks the paths of sources
// strictly. A DHCP server answers a renewal, for which it must first find the client's address by ARP.
func TestStrictPathNeighbour(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		w := newWorld(t)
		h, tun := up(t, testConfig(t))
		for _, d := range []string{"all", "eth0"} {
			if err := writeSysctl("net/ipv4/conf/"+d+"/rp_filter", "1"); err != nil {
				t.Fatal(err)
			}
		}
		client, err := net.ListenUDP("udp4", &net.UDPAddr{Port: 68})
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		var server *net.UDPConn
		w.in(func() { server, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP("198.51.100.1"), Port: 67}) })
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		for _, c := range []*net.UDPConn{client, server} {
			_ = c.SetReadDeadline(time.Now().Add(testkit.Patience))
		}
		if _, err := client.WriteTo([]byte("renew"), server.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		_, from, err := server.ReadFrom(make([]byte, 100))
		if err != nil {
			t.Fatalf("the request did not arrive: %v", err)
		}
		w.in(func() { ip(t, "neigh flush dev eth0p") })
		if _, err := server.WriteTo([]byte("answer"), from); err != nil {
			t.Fatal(err)
		}
		if _, _, err := client.ReadFrom(make([]byte, 100)); err != nil {
			t.Errorf("the answer did not arrive: %v", err)
		}
		down(t, h)
		tun.Close()
	})
}
