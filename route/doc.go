// Package route decides which upstream carries a flow, and keeps the state of the flows: for TCP the pending dial and
// the flow table, for UDP the mappings and their associations.
//
// The parts, in a packet's order:
//
//	Rule         a line of policy; the first that matches decides: an upstream, reject, drop
//	Upstream     what carries a flow: SOCKS servers, or direct
//	Router       takes flows from the stack (stack.Handler) and gives them to an upstream and a relay loop
//
// A TCP flow (streams.go): HandleStream takes the verdict, tells the upstream to dial and returns. The upstream's answer
// is turned into Accept (by the relay loop) or into the refusal that the app would have met directly (outcome.go).
// Neither a pending dial nor an idle flow holds a goroutine.
//
// UDP (udp.go, mapping.go): one mapping for each app endpoint, whatever the destination, and in it one association for
// each upstream that its destinations' verdicts ask for (RFC 4787: endpoint-independent mapping and filtering).
//
// Goroutines of a Router: Run itself (opens and closes associations, expires mappings), one that writes the flow log,
// and those of route/dns. The frame reader calls HandleStream and HandlePackets; relay loops call the sinks.
//
// Port 53 is answered by route/dns over UDP whatever address was asked. TCP to port 53 is carried to the first resolver if that is
// of tcp://, and else answered by route/dns too. Both come before any rule is looked at. With RelayDNS questions go to the server
// that was asked.
package route
