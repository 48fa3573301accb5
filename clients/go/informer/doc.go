// Package informer keeps a local copy of the resources of one kind, fresh by a watch, indexed, and in little memory.
//
//	domains := informer.Domains(client)
//	queue := informer.NewQueue[string]()
//	domains.Handle(informer.EnqueueUIDs[*computev1.Domain](queue))
//	go domains.Run(ctx)
//	if err := domains.WaitSynced(ctx); err != nil { … }
//	queue.Run(ctx, 4, func(ctx context.Context, uid string) error {
//		domain, known := domains.Get(uid)
//		…
//	})
//
// An informer never lists: the watch begins with a snapshot of all that exists and goes on by token over lost connections, restarted
// gateways and drains. What is not known to be fresh is told: [Informer.Source] says for each node whether its part is live, as last
// seen, or being read anew, and [Informer.Connected] whether the watch itself stands. A domain that moves to another node stays one
// object.
package informer
