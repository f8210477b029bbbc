#!/bin/bash
#
# Question: does the cost of a received packet depend on how many destinations are in use, when gVisor's IPv4 takes packets for
# every address (promiscuous mode), as programs that end the connections of others set it?
#
# Why it matters: each destination in use has a temporary address at the NIC. A miss in the table of addresses, as for the source
# of every packet, walks all of them, so that each packet of each connection costs more as the number of peers grows.
#
# Seen with: gvisor.dev/gvisor of 5 September 2026. Explained by: the IPv4 endpoint looks addresses up with a matching function
# (AcquireAssignedAddressOrMatching in pkg/tcpip/stack/addressable_endpoint_state.go), which is asked for each address. IPv6
# has none.

. "$(dirname "$0")/lib.bash"

need go
go_program gvisor.dev/gvisor@v0.0.0-20260905035102-160fafc42237 <<'GO'
package main

import (
	"fmt"
	"log"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const nic = 1

// cost is the time that a received packet takes, with held temporary addresses in use. Its source is another host, and its
// transport protocol is unknown to the stack.
func cost(proto tcpip.NetworkProtocolNumber, held int) time.Duration {
	s := stack.New(stack.Options{NetworkProtocols: []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol}})
	defer s.Destroy()
	device := channel.New(1, 1500, "")
	if err := s.CreateNIC(nic, device); err != nil {
		log.Fatal(err)
	}
	s.SetPromiscuousMode(nic, true)
	s.SetSpoofing(nic, true)
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nic}, {Destination: header.IPv6EmptySubnet, NIC: nic}})
	const unknown = 253 // RFC 3692: for experiments
	var packet []byte
	address := func(n int) tcpip.Address {
		if proto == ipv4.ProtocolNumber {
			return tcpip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
		}
		return tcpip.AddrFrom16([16]byte{0xfd, 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)})
	}
	remote := address(1 << 20)
	if proto == ipv4.ProtocolNumber {
		packet = make([]byte, header.IPv4MinimumSize+8)
		h := header.IPv4(packet)
		h.Encode(&header.IPv4Fields{TotalLength: uint16(len(packet)), TTL: 64, Protocol: unknown, SrcAddr: remote, DstAddr: address(1)})
		h.SetChecksum(^h.CalculateChecksum())
	} else {
		packet = make([]byte, header.IPv6MinimumSize+8)
		header.IPv6(packet).Encode(&header.IPv6Fields{PayloadLength: 8, TransportProtocol: unknown, HopLimit: 64, SrcAddr: remote,
			DstAddr: address(1)})
	}
	for i := range held {
		r, err := s.FindRoute(nic, address(i+1), remote, proto, false)
		if err != nil {
			log.Fatal(err)
		}
		defer r.Release()
	}
	const rounds = 1000
	var times []time.Duration
	for range 9 {
		begin := time.Now()
		for range rounds {
			p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
			device.InjectInbound(proto, p)
			p.DecRef()
		}
		times = append(times, time.Since(begin)/rounds)
	}
	return slices.Min(times)
}

func main() {
	grows := func(proto tcpip.NetworkProtocolNumber) string {
		few, many := cost(proto, 10), cost(proto, 4000)
		log.Printf("protocol %#x: %v with 10 addresses, %v with 4000", proto, few, many)
		if many > 8*few {
			return "grows"
		}
		return "flat"
	}
	fmt.Printf("IPv4 %s, IPv6 %s\n", grows(ipv4.ProtocolNumber), grows(ipv6.ProtocolNumber))
}
GO
seen=$("$work/program" 2>"$work/times")

report version "gvisor.dev/gvisor v0.0.0-20260905035102-160fafc42237"
report expected "a received packet costs the same with 10 and with 4,000 destinations in use"
report seen "$seen ($(sed 's/^[^ ]* [^ ]* //' "$work/times" | paste -sd ';'))"
conclude "$seen" "IPv4 grows, IPv6 flat"
