// Package stack is the userspace TCP/IP stack that ends the captured flows, and the only importer of gVisor's netstack.
//
// A frame's way in: Run (the one frame reader) reads from tun.Device; UDP goes by the fast path straight to
// Handler.HandlePackets; everything else goes into gVisor as one packet, however long, by way of an IP layer (ipEndpoint)
// that has one state for all addresses. A TCP segment for which gVisor has no endpoint comes to the pending table: a SYN
// becomes a flow.StreamRequest and is not answered before the upstream has (dial before accept).
//
// A frame's way out: gVisor's packets go by link to tun.Device.Write with their offload header, up to 64 KiB in one
// frame; UDP replies and ICMP errors are built here and written past gVisor.
//
// What has a goroutine: Run, and gVisor's TCP processors (one for each CPU). A pending dial, a handshake and an idle flow have
// none.
package stack
