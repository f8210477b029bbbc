package dns

// Judge decides whether a question is answered. If not, the answer is REFUSED at once, and nothing of the question
// leaves this host. name is in lower case and without the dot at its end, with an exclamation mark for each byte that
// no host name contains (above all a dot inside a label, which would make one label look like two). It is empty for
// the root and for a message without a question. query is false for every operation except QUERY (such as UPDATE and
// NOTIFY). Judge is called on the goroutine that submits the question, once for each well-formed one.
type Judge func(name string, query bool) bool

// allows calls j for the question of msg. A nil Judge allows everything.
func (j Judge) allows(msg []byte, q *question) bool {
	if j == nil {
		return true
	}
	return j(questionName(msg, q), q.isQuery())
}

// questionName returns the name that is asked for, in the form that Judge documents.
func questionName(msg []byte, q *question) string {
	if q.end == 0 {
		return ""
	}
	var buf [maxName]byte
	name, _, _ := appendAny(buf[:0], msg, headerLen)
	return string(name)
}
